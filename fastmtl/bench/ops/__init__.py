"""Benchmarks of fastmtl_kernels: a file for each operation, whose `cases(size)` lists its cases."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastmtl.bench.sizes import SHAPES, Size
from fastmtl.errors import unknown_name

if TYPE_CHECKING:
    from fastmtl.bench.ops.case import Case

OPERATIONS = (
    "varlen_attention",
    "disentangled_attention",
    "add_layer_norm",
    "embed_layer_norm",
    "dropout",
    "pool",
    "geglu",
    "low_rank",
    "lora",
    "pal",
    "gramian",
    "combine",
    "combined_adamw",
    "pcgrad_weights",
    "gradvac_weights",
)


# A size for listing the implementations, and for trying every operation in a moment.
TINY = SHAPES["tiny"]


def cases(operation: str, size: Size) -> list[Case]:
    """Return an operation's cases, each with inputs and implementations.

    Raises UserError for an unknown operation.
    """
    if operation not in OPERATIONS:
        raise unknown_name("operation", operation, OPERATIONS)
    found: list[Case] = importlib.import_module(f"fastmtl.bench.ops.{operation}").cases(size)
    return found
