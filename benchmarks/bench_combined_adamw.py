"""Benchmark of combined_adamw and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "combined_adamw"


def test_combined_adamw(measured: Callable[[], None]) -> None:
    measured()
