"""Benchmark of pal and its alternatives, which fastmtl/bench/ops/pal.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "pal"


def test_pal(measured: Callable[[], None]) -> None:
    measured()
