"""pal and its alternatives: pytest-benchmark of fastmtl/bench/ops/pal.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "pal"


def test_pal(measured: Callable[[], None]) -> None:
    measured()
