"""Benchmark of dropout and its alternatives, which fastmtl/bench/ops/dropout.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "dropout"


def test_dropout(measured: Callable[[], None]) -> None:
    measured()
