"""Benchmark of combine and its alternatives, which fastmtl/bench/ops/combine.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "combine"


def test_combine(measured: Callable[[], None]) -> None:
    measured()
