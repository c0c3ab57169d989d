"""combine and its alternatives: pytest-benchmark of fastmtl/bench/ops/combine.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "combine"


def test_combine(measured: Callable[[], None]) -> None:
    measured()
