"""The most that a fused bias and GELU could save on this machine.

    python benchmarks/bias_gelu.py

In forward, the library adds the bias inside the product, so a fused operation saves at most the
time of `linear + gelu` less that of `the same without a bias`. In backward, it saves at most the
time of `bias sums`, which read dy a second time. Both are printed as shares of the layer's whole
time, including its three products. float32, three tasks, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

TASKS = 3


def measured(tokens: int, hidden: int, rounds: int) -> dict[str, float]:
    """Return median seconds of each part of Linear(hidden, 4 hidden) and GELU, on `tokens` rows."""
    x, w, b = torch.randn(tokens, hidden), torch.randn(4 * hidden, hidden), torch.randn(4 * hidden)
    z, dy = torch.randn(tokens, 4 * hidden), torch.randn(tokens, 4 * hidden)
    parts: dict[str, Callable[[], object]] = {
        "linear + gelu": lambda: functional.gelu(functional.linear(x, w, b)),
        "the same without a bias": lambda: functional.gelu(torch.mm(x, w.t())),
        "gelu backward": lambda: torch.ops.aten.gelu_backward(dy, z),
        "bias sums": lambda: [part.sum(0) for part in dy.chunk(TASKS)],
        "products of backward": lambda: (dy @ w, dy.t() @ x),
    }
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(of_part) for name, of_part in samples.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2670)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    for hidden in (384, 768):
        found = measured(given.tokens, hidden, given.rounds)
        whole = sum(found.values()) - found["the same without a bias"]
        saved = found["linear + gelu"] - found["the same without a bias"], found["bias sums"]
        print(f"hidden {hidden}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in found.items()))
        print(f"  forward {saved[0] / whole:.1%}, backward {saved[1] / whole:.1%} of the layer's {1e3 * whole:.0f} ms")
