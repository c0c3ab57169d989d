"""Benchmark of pcgrad_weights and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "pcgrad_weights"


def test_pcgrad_weights(measured: Callable[[], None]) -> None:
    measured()
