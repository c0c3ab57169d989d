"""The operations of fastmtl_kernels and what each is measured beside: one file for each, `cases(size)` in it."""

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


# To look at what there is, and to try everything in a moment.
TINY = SHAPES["tiny"]


def cases(operation: str, size: Size) -> list[Case]:
    """What is measured of an operation. Raises UserError for a name that is none."""
    if operation not in OPERATIONS:
        raise unknown_name("operation", operation, OPERATIONS)
    found: list[Case] = importlib.import_module(f"fastmtl.bench.ops.{operation}").cases(size)
    return found
