"""Benchmark of embed_layer_norm and its alternatives, which fastmtl/bench/ops defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "embed_layer_norm"


def test_embed_layer_norm(measured: Callable[[], None]) -> None:
    measured()
