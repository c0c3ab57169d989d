"""lora and its alternatives: pytest-benchmark of fastmtl/bench/ops/lora.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "lora"


def test_lora(measured: Callable[[], None]) -> None:
    measured()
