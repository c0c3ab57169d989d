"""dropout and its alternatives: pytest-benchmark of fastmtl/bench/ops/dropout.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "dropout"


def test_dropout(measured: Callable[[], None]) -> None:
    measured()
