"""combined_adamw and its alternatives: pytest-benchmark of fastmtl/bench/ops/combined_adamw.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "combined_adamw"


def test_combined_adamw(measured: Callable[[], None]) -> None:
    measured()
