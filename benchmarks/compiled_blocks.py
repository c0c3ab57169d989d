"""Times steps of gradient surgery on a BertModel of MiniLM's size, with and without torch.compile.

    OMP_NUM_THREADS=1 python benchmarks/compiled_blocks.py [--method sum] [--steps 11]

The ways take turns, so that a disturbance meets all of them. Prints medians and extremes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel

from fastmtl.surgery import GradientSurgery

ROWS, TOKENS, TASKS = 8, 64, ("first", "second")
WAYS = ("plain", "activations", "layers")


def make_step(way: str, method: str) -> Callable[[], object]:
    """Return a function that runs one step of a new model whose layers are compiled, or less."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    trunk = BertModel(config, add_pooling_layer=False).train()
    for layer in trunk.encoder.layer:
        if way != "plain":
            (layer if way == "layers" else layer.intermediate.intermediate_act_fn).compile()
    heads = nn.ModuleList([nn.Linear(384, 3) for _ in TASKS])
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    surgery = GradientSurgery(optimizer, method, tasks=TASKS, model=trunk, verify_every=0)
    ids, lengths = torch.randint(5, 30_000, (ROWS, TOKENS)), torch.randint(TOKENS // 2, TOKENS + 1, (ROWS, 1))
    mask, tasks = (torch.arange(TOKENS) < lengths).long(), torch.arange(ROWS) % 2
    wanted = torch.zeros(ROWS // 2, dtype=torch.int64)

    def step() -> None:
        optimizer.zero_grad()
        with surgery.rows(tasks):
            hidden = trunk(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        outputs = [head(hidden[tasks == task]) for task, head in enumerate(heads)]
        losses = [F.cross_entropy(output, wanted, reduction="sum") for output in outputs]
        surgery.backward({name: (loss, ROWS // 2) for name, loss in zip(TASKS, losses, strict=True)})
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="pcgrad")
    parser.add_argument("--steps", type=int, default=11)
    options = parser.parse_args()
    steps = {way: make_step(way, options.method) for way in WAYS}
    for way, step in steps.items():
        begun = time.perf_counter()
        step()
        step()
        print(f"{way}: the first two steps took {time.perf_counter() - begun:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.steps):
        for way, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - begun)
    plain = statistics.median(seconds["plain"])
    for way, found in seconds.items():
        median = statistics.median(found)
        spread = f"{1000 * min(found):.0f} to {1000 * max(found):.0f}"
        print(f"{way:12} {1000 * median:6.0f} ms ({spread}), {median / plain:.2f} of plain")


if __name__ == "__main__":
    main()
