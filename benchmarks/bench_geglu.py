"""Benchmark of geglu and its alternatives, which fastmtl/bench/ops/geglu.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "geglu"


def test_geglu(measured: Callable[[], None]) -> None:
    measured()
