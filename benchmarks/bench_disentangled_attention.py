"""Benchmark of disentangled_attention and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "disentangled_attention"


def test_disentangled_attention(measured: Callable[[], None]) -> None:
    measured()
