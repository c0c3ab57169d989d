"""Benchmark of gradvac_weights and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "gradvac_weights"


def test_gradvac_weights(measured: Callable[[], None]) -> None:
    measured()
