"""The operations of fastmtl_kernels and their alternatives: one file each, with `cases(size)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastmtl.bench.sizes import SHAPES, Size
from fastmtl.errors import unknown_name

if TYPE_CHECKING:
    from fastmtl.bench.ops.case import Case

OPERATIONS = (
    "varlen_attention",
    "add_layer_norm",
    "embed_layer_norm",
    "dropout",
    "pool",
    "low_rank",
    "lora",
    "pal",
    "gramian",
    "combine",
    "combined_adamw",
    "pcgrad_weights",
    "gradvac_weights",
)


# For listing the implementations, and for trying everything in a moment.
TINY = SHAPES["tiny"]


def cases(operation: str, size: Size) -> list[Case]:
    """Return the cases of an operation. Raise UserError for an unknown name."""
    if operation not in OPERATIONS:
        raise unknown_name("operation", operation, OPERATIONS)
    found: list[Case] = importlib.import_module(f"fastmtl.bench.ops.{operation}").cases(size)
    return found
