"""Benchmark of low_rank and its alternatives, which fastmtl/bench/ops/low_rank.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "low_rank"


def test_low_rank(measured: Callable[[], None]) -> None:
    measured()
