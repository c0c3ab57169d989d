"""Benchmark of lora and its alternatives, which fastmtl/bench/ops/lora.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "lora"


def test_lora(measured: Callable[[], None]) -> None:
    measured()
