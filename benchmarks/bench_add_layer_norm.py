"""Benchmark of add_layer_norm and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "add_layer_norm"


def test_add_layer_norm(measured: Callable[[], None]) -> None:
    measured()
