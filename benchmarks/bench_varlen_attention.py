"""Benchmark of varlen_attention and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "varlen_attention"


def test_varlen_attention(measured: Callable[[], None]) -> None:
    measured()
