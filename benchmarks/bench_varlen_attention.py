"""varlen_attention and its alternatives: pytest-benchmark of fastmtl/bench/ops."""

from __future__ import annotations

from collections.abc import Callable

OP = "varlen_attention"


def test_varlen_attention(measured: Callable[[], None]) -> None:
    measured()
