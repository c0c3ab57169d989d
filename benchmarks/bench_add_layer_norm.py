"""add_layer_norm and its alternatives: pytest-benchmark of fastmtl/bench/ops/add_layer_norm.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "add_layer_norm"


def test_add_layer_norm(measured: Callable[[], None]) -> None:
    measured()
