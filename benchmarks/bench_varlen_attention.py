"""varlen_attention and what it replaces, through pytest-benchmark: fastmtl/bench/ops/varlen_attention.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "varlen_attention"


def test_varlen_attention(measured: Callable[[], None]) -> None:
    measured()
