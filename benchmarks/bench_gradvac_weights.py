"""gradvac_weights and its alternatives: pytest-benchmark of fastmtl/bench/ops."""

from __future__ import annotations

from collections.abc import Callable

OP = "gradvac_weights"


def test_gradvac_weights(measured: Callable[[], None]) -> None:
    measured()
