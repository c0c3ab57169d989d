"""Times steps with and without fastmtl.surgery.diagnose, in each storage, every step measured.

    OMP_NUM_THREADS=2 python benchmarks/diagnosis.py [--rows 8] [--steps 7] [--processor-time]

PCGrad on a BertModel of MiniLM's size, three tasks. Steps with and without take turns, so that a
disturbance meets both. Prints medians and extremes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel

from fastmtl.surgery import GradientSurgery, diagnose
from fastmtl.surgery.checks import Storage
from fastmtl.surgery.losses import Losses

TASKS, TOKENS = ("first", "second", "third"), 32
STORAGES: tuple[Storage, ...] = ("stacked", "kept", "replay")


def make_step(storage: Storage, rows: int, *, measured: bool) -> Callable[[], object]:
    """Return a function that runs one step of a new model. rows: of each task."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    trunk = BertModel(config, add_pooling_layer=False)
    heads = nn.ModuleList(nn.Linear(384, 3) for _ in TASKS)
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    surgery = GradientSurgery(optimizer, "pcgrad", tasks=TASKS, model=trunk, storage=storage, verify_every=0)
    if measured:
        diagnose(surgery, every=1)
    ids, wanted = torch.randint(5, 30_000, (rows * len(TASKS), TOKENS)), torch.zeros(rows, dtype=torch.int64)

    def losses_of(_: object) -> Losses:
        with surgery.rows(dict.fromkeys(TASKS, rows)):
            hidden = trunk(input_ids=ids).last_hidden_state[:, 0]
        outputs = [head(part) for head, part in zip(heads, hidden.split(rows), strict=True)]
        losses = [cross_entropy(output, wanted, reduction="sum") for output in outputs]
        return {task: (loss, rows) for task, loss in zip(TASKS, losses, strict=True)}

    def step() -> None:
        optimizer.zero_grad()
        surgery.run([None], losses_of)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of each task")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="for a machine with other work")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    for storage in STORAGES:
        steps = {measured: make_step(storage, options.rows, measured=measured) for measured in (False, True)}
        seconds: dict[bool, list[float]] = {measured: [] for measured in steps}
        for number in range(options.steps + 1):
            for diagnosed, step in steps.items():
                begun = clock()
                step()
                if number:  # the first step allocates
                    seconds[diagnosed].append(clock() - begun)
        without, measured = (statistics.median(found) for found in seconds.values())
        spread = " and ".join(f"{min(found):.2f} to {max(found):.2f}" for found in seconds.values())
        print(
            f"{storage:8} {without:.2f} s without, {measured:.2f} s with diagnose: {measured / without:.3f}x ({spread})"
        )


if __name__ == "__main__":
    main()
