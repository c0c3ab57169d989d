"""pcgrad_weights and its alternatives: pytest-benchmark of fastmtl/bench/ops/pcgrad_weights.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "pcgrad_weights"


def test_pcgrad_weights(measured: Callable[[], None]) -> None:
    measured()
