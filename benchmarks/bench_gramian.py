"""gramian and its alternatives: pytest-benchmark of fastmtl/bench/ops/gramian.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "gramian"


def test_gramian(measured: Callable[[], None]) -> None:
    measured()
