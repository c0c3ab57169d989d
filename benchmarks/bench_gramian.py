"""Benchmark of gramian and its alternatives, which fastmtl/bench/ops/gramian.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "gramian"


def test_gramian(measured: Callable[[], None]) -> None:
    measured()
