"""Times of three ways to compute the gradient of V_E, the matrix that pal shares over its layers.

    python benchmarks/deferred_gradients.py

dV_E is the sum of de_l^T x_l over the layers l, with V_E's inputs x_l [tokens, hidden] and output
gradients de_l [tokens, d_s]. `each layer` forms every product and adds it, as autograd does. `in
place` uses a product that adds to its result. `deferred` keeps all x_l and de_l and multiplies
their concatenations once. `deferred, product alone` does not measure the concatenation: a lower
bound that no implementation reaches. 12 layers, d_s 204, three tasks of 909 tokens, float32,
medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LAYERS, TASKS, TOKENS, SIZE = 12, 3, 909, 204
Rows = list[list[Tensor]]  # by layer and task


def each_layer(x: Rows, de: Rows) -> Tensor:
    total = torch.zeros(TASKS, SIZE, x[0][0].shape[1])
    for x_layer, de_layer in zip(x, de, strict=True):
        gradient = torch.empty_like(total)
        for task in range(TASKS):
            torch.mm(de_layer[task].T, x_layer[task], out=gradient[task])
        total += gradient
    return total


def in_place(x: Rows, de: Rows) -> Tensor:
    total = torch.zeros(TASKS, SIZE, x[0][0].shape[1])
    for x_layer, de_layer in zip(x, de, strict=True):
        for task in range(TASKS):
            total[task].addmm_(de_layer[task].T, x_layer[task])
    return total


def deferred(x: Rows, de: Rows) -> Tensor:
    return product(joined(x), joined(de))


def joined(rows: Rows) -> list[Tensor]:
    return [torch.cat(of_task) for of_task in zip(*rows, strict=True)]


def product(x: list[Tensor], de: list[Tensor]) -> Tensor:
    return torch.stack([de_task.T @ x_task for x_task, de_task in zip(x, de, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    def rows(columns: int) -> Rows:
        return [list(torch.randn(TASKS, TOKENS, columns).unbind()) for _ in range(LAYERS)]

    torch.manual_seed(0)
    x, de = rows(options.hidden), rows(SIZE)
    variants: dict[str, Callable[[], Tensor]] = {
        "each layer": partial(each_layer, x, de),
        "in place": partial(in_place, x, de),
        "deferred": partial(deferred, x, de),
        "deferred, product alone": partial(product, joined(x), joined(de)),
    }
    expected = each_layer(x, de)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(options.rounds + 2):
        for name, variant in variants.items():
            start = time.perf_counter()
            found = variant()
            elapsed = time.perf_counter() - start
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
            if round_number >= 2:
                seconds[name].append(elapsed)
    for name, samples in seconds.items():
        print(f"{name:24} {1e3 * statistics.median(samples):6.1f} ms")
    held = sum(part.numel() for of_layer in (*x, *de) for part in of_layer) * 4
    print(f"x and de of all layers, held by `deferred` until the end of backward: {held / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
