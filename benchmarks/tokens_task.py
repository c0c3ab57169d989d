"""Step time of a task of type tokens beside the three tasks of CS224N, against its share of tokens.

    python benchmarks/tokens_task.py CS224N_FOLDER FILE.conllu

Each batch is run with and without the rows of the tokens task (UPOS tags, cross-entropy), one after
the other. A ratio of times at most as large as that of the tokens means that the task costs no more
than its share.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastmtl.config import TaskConfig, load_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.readers import read_rows
from fastmtl.data.tokenized import tokenize
from fastmtl.model.encoder.pretrained import load_encoder, load_tokenizer
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery

TAGS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split()
ROWS, BATCHES, REPEATS = 11, 4, 4


def main(folder: str, file: str) -> None:
    recipe = load_recipe("cs224n", [f"data.dir={folder}"])
    data = {"train": str(Path(file).absolute())}
    tagging = TaskConfig.model_validate({"type": "tokens", "label_names": TAGS, "data": data})
    recipe = recipe.model_copy(update={"tasks": {**recipe.tasks, "upos": tagging}})
    tokenizer, encoder = load_tokenizer(recipe.encoder), load_encoder(recipe.encoder)
    datasets = []
    for task in recipe.tasks.values():
        task = task.model_copy(update={"data": task.data.model_copy(update={"limit": 2000})})
        rows = read_rows(task, recipe.data, "train")
        datasets.append(tokenize(rows, tokenizer, task, encoder.max_length, recipe.data.cache_dir))
    model = MultiTaskModel(recipe, encoder).train()
    random = np.random.default_rng(0)
    none = np.zeros(0, dtype=np.int64)
    for method in ("sum", "pcgrad"):
        step = step_of(model, method)
        shares, ratios = [], []
        for _ in range(BATCHES):
            chosen = [(dataset, random.integers(0, len(dataset), ROWS)) for dataset in datasets]
            four, three = pack(chosen), pack([*chosen[:3], (datasets[3], none)])
            times: list[list[float]] = [[], []]
            for batch in (three, four):
                step(batch)
            for _ in range(REPEATS):
                for batch, seconds in zip((three, four), times, strict=True):
                    begun = time.perf_counter()
                    step(batch)
                    seconds.append(time.perf_counter() - begun)
            ratios.append(statistics.median(times[1]) / statistics.median(times[0]))
            shares.append(four.num_tokens / three.num_tokens)
        parts = [f"{ratio:.2f}/{share:.2f}" for ratio, share in zip(ratios, shares, strict=True)]
        print(
            f"{method}: time x{statistics.median(ratios):.2f}, tokens x{statistics.median(shares):.2f} with the tokens "
            f"task (time/tokens of {BATCHES} batches: {', '.join(parts)})"
        )


def step_of(model: MultiTaskModel, method: str) -> Callable[[PackedBatch], None]:
    """Return a training step; sum is one backward pass of the sum of the tasks' mean losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    surgery = GradientSurgery(
        optimizer,
        method,
        tasks=model.recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
    )

    def step(batch: PackedBatch) -> None:
        optimizer.zero_grad()
        surgery.run([batch], lambda batch, task_grads: model(batch, task_grads))
        optimizer.step()

    return step


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
