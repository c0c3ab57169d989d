"""Errors of G and of the merged gradient of a bfloat16 model, with J in float32 and in bfloat16.

    python benchmarks/jacobian_dtype.py [--hidden 128] [--layers 4] [--seeds 3]

The reference is one backward pass per task in float64, with the same weights (rounded to bfloat16
before). `torch` is one backward pass per task in bfloat16 whose gradients are added in `.grad`,
merged in float64. The error of G is the largest of |G_ij - exact| / (|g_i| |g_j|); its bound is
twice torch's and 2^-6 (tests/surgery/test_any_batch.py). The error of the merged gradient is |u -
exact| / |exact|, of direction and length. In strong conflict two of the three tasks have the same
rows, opposite labels and nearly equal heads: the update is small compared with its terms.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig

from fastmtl.bench.sizes import lengths_of_rows
from fastmtl.config import parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods.order import draw_order

TASKS = ("up", "down", "other")
ROWS, VOCABULARY = 8, 1000  # rows per task and micro-batch


def make_model(hidden: int, layers: int, seed: int, strong: bool) -> MultiTaskModel:
    torch.manual_seed(seed)
    kind = {"type": "binary", "data": {"train": "none"}, "head": {"dropout": 0.0}}
    recipe = parse_recipe({"tasks": {name: kind for name in TASKS}, "gradient": {"method": "pcgrad"}}, "benchmark")
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    model = MultiTaskModel(recipe, PackedBert(config)).eval()
    if strong:
        up, down = model.heads[0].state_dict(), model.heads[1].state_dict()
        model.heads[1].load_state_dict({key: up[key] + 0.05 * (down[key] - up[key]) for key in up})
    return model


def make_batches(parts: int, seed: int, strong: bool) -> list[PackedBatch]:
    datasets: list[TokenizedDataset] = []
    for task, name in enumerate(TASKS):
        random, rows = np.random.default_rng([seed, 0 if strong and name == "down" else task]), ROWS * parts
        lengths = random.permutation(lengths_of_rows(0, rows))
        labels = (random.random(rows) < 0.9).astype(np.float32)
        datasets.append(
            TokenizedDataset(
                tokens=random.integers(0, VOCABULARY, lengths.sum()).astype(np.int32),
                offsets=np.concatenate([[0], np.cumsum(lengths)]),
                second_text=lengths.astype(np.int32),
                sequences_per_example=1,
                labels=1 - labels if name == "down" else labels,
                ids=[str(row) for row in range(rows)],
                truncated=0,
                skipped=[],
                path=Path("none"),
            )
        )
    return [pack([(data, np.arange(part, ROWS * parts, parts)) for data in datasets]) for part in range(parts)]


def by_torch(model: MultiTaskModel, batches: list[PackedBatch]) -> Tensor:
    """Return J [T, P] float64 of the shared parameters, one backward pass per task and micro-batch.

    The gradients of micro-batches add up in `.grad`, in the model's dtype.
    """
    rows = []
    for task in TASKS:
        model.zero_grad()
        for batch in batches:
            (model(batch)[task][0] / (ROWS * len(batches))).backward()
        rows.append(torch.cat([p.grad.double().flatten() for p in model.shared_parameters() if p.grad is not None]))
    return torch.stack(rows)


def by_surgery(model: MultiTaskModel, batches: list[PackedBatch], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return G [T, T] and the merged gradient [P] in float64."""
    model.zero_grad()
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1),
        tasks=list(TASKS),
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        dtype=dtype,
    )
    counts = {task: ROWS * len(batches) for task in TASKS}
    info = surgery.run(batches, lambda batch, task_grads: model(batch, task_grads), counts)
    assert info.cosines is not None and info.task_norms is not None
    gram = info.cosines.double() * info.task_norms.double().outer(info.task_norms.double())
    shared = [p.grad.double().flatten() for p in model.shared_parameters() if p.grad is not None]
    return gram, torch.cat(shared)


def merged(rows: Tensor) -> Tensor:
    """Return PCGrad's merged gradient [P] for J `rows` [T, P], in the order of the first step."""
    order, total = draw_order(len(rows), 0, 1).tolist(), torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        for j in order[i]:
            if j != i and row @ rows[j] < 0:
                row = row - (row @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        total += row
    return total


def main(hidden: int, layers: int, seeds: int) -> None:
    torch.set_num_threads(1)
    head = "micro-batches | conflict | smallest cosine | update / parts"
    print(f"| {head} | G: torch | J float32 | J bfloat16 | update: torch | J float32 | J bfloat16 |")
    print("|---" * 10 + "|")
    for parts in (1, 4, 16):
        for strong in (False, True):
            found = [errors(hidden, layers, seed, parts, strong) for seed in range(seeds)]
            cosine, *shares = np.array(found).mean(0)
            cells = " | ".join(f"{value:.2%}" for value in shares)
            print(f"| {parts} | {'strong' if strong else 'weak'} | {cosine:.2f} | {cells} |", flush=True)


def errors(hidden: int, layers: int, seed: int, parts: int, strong: bool) -> list[float]:
    model = make_model(hidden, layers, seed, strong).bfloat16()
    batches = make_batches(parts, seed, strong)
    exact = by_torch(copy.deepcopy(model).double(), batches)
    plain = by_torch(model, batches)
    norms, update = exact.norm(dim=1), merged(exact)
    sizes, gram = norms.outer(norms), exact @ exact.T
    of_gram = [float(((plain @ plain.T - gram) / sizes).abs().max())]
    of_update = [float((merged(plain) - update).norm() / update.norm())]
    for dtype in (torch.float32, torch.bfloat16):
        surgery_gram, surgery_update = by_surgery(model, batches, dtype)
        of_gram.append(float(((surgery_gram - gram) / sizes).abs().max()))
        of_update.append(float((surgery_update - update).norm() / update.norm()))
    return [float((gram / sizes).min()), float(update.norm() / norms.sum()), *of_gram, *of_update]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    main(chosen.hidden, chosen.layers, chosen.seeds)
