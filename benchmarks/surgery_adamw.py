"""Time of the end of a PCGrad step, once the task weights are known, on one CPU thread.

    python benchmarks/surgery_adamw.py

`SurgeryAdamW` merges, clips and updates in one pass. It is compared with three passes: merging,
clip_grad_norm_ and torch's fused AdamW. MiniLM's parameters, three tasks of 909 tokens, float32,
median CPU seconds of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.targets.adamw import SurgeryAdamW, TaskUpdate

TASKS, TOKENS, VOCABULARY = 3, 909, 30522
# A made-up norm of the merged gradient; its value does not change the time.
NORM = 1e4


def parameters(hidden: int, layers: int) -> list[nn.Parameter]:
    """Return BERT's parameters without the pooler; the word embedding table comes first."""
    wide, square, column = 4 * hidden, (hidden, hidden), (hidden,)
    layer = [*(4 * [square, column]), (wide, hidden), (wide,), (hidden, wide), *(5 * [column])]
    shapes = [(VOCABULARY, hidden), (512, hidden), (2, hidden), column, column, *(layers * layer)]
    return [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    words, *others = ours = parameters(options.hidden, options.layers)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    sink, weights = StackSink(ours, TASKS, sparse=[words]), torch.tensor([0.5, 1.0, 0.7])
    sink.arm(words.device)
    for task in range(TASKS):
        sink.add_rows(words, task, torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS, options.hidden))
        for parameter in others:
            sink.stack_of(parameter).add_task(parameter, task, torch.randn(parameter.shape))
    fed, fused = SurgeryAdamW(ours, max_norm=1.0), torch.optim.AdamW(theirs, fused=True)

    def at_once() -> None:
        fed.take(TaskUpdate(weights, *sink.unmerged(weights), {}, NORM))
        fed.step()

    def separately() -> None:
        merged = sink.combine(weights)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = merged[id(mine)]
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        fused.step()
        fused.zero_grad()

    ways: dict[str, Callable[[], None]] = {"SurgeryAdamW": at_once, "merge, clip, AdamW": separately}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, step in ways.items():
            begun = time.process_time()
            step()
            if number:  # the first step allocates the moments
                samples[name].append(time.process_time() - begun)
    for name, found in samples.items():
        print(f"{name:20} {1e3 * statistics.median(found):7.1f} ms")
    print(f"{'ratio':20} {statistics.median(a / b for a, b in zip(*samples.values(), strict=True)):7.2f}")


if __name__ == "__main__":
    main()
