"""What can be chosen of gradient surgery, and which choices cannot keep their promise together."""

from __future__ import annotations

from typing import Literal

import torch

from fastmtl.errors import UserError
from fastmtl.surgery.methods.table import Method
from fastmtl.surgery.ranks.reduce import Alone, Ranks, Together, world_size

Storage = Literal["auto", "stacked", "kept", "replay"]
Scope = Literal["global", "tensor"]
Reduce = Literal["exact", "local", "sketch"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SKETCH_SIZE = 32_768


def check_options(
    stacks: bool,
    method: Method | None,
    *,
    storage: str,
    scope: str,
    reduce: str,
    dtype: torch.dtype,
    sketch_size: int,
    world: int | None = None,
) -> str:
    """The storage to use: "stacked", "kept", "replay", or "none" for `scope="tensor"`, which keeps nothing.

    stacks: whether the target takes merged gradients. world: number of ranks, where they have not met yet.
    Raises UserError for an unknown value, and for a combination with its reason and the nearest one that works.
    """
    _one_of("storage", storage, ("auto", "stacked", "kept", "replay"))
    _one_of("scope", scope, ("global", "tensor"))
    _one_of("reduce", reduce, ("exact", "local", "sketch"))
    if dtype not in DTYPES.values():
        raise UserError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if sketch_size < 16:
        raise UserError(f"sketch_size must be at least 16 buckets, got {sketch_size}")
    if method is None:
        return "none"
    if reduce == "local" and (world or world_size()) > 1 and not method.by_rank:
        raise UserError(
            "reduce='local': every rank would solve for itself, which only pcgrad does without state or a solver that "
            "must agree between ranks; use reduce='exact', or method='pcgrad'"
        )
    if scope == "tensor":
        _check_tensor_scope(method, storage, reduce, dtype)
        return "none"
    if storage in ("stacked", "kept") and not stacks:
        raise UserError(
            f"storage='{storage}' needs every gradient at hand, which ZeRO 3 and offload do not give: use "
            "storage='replay'"
        )
    chosen = storage if storage != "auto" else ("stacked" if stacks else "replay")
    if chosen != "stacked" and dtype != torch.float32:
        raise UserError(
            f"dtype={dtype} is that of J, and storage='{chosen}' keeps none: use torch.float32, or storage='stacked' "
            "with ZeRO 0 to 2 without offload"
        )
    return chosen


def _check_tensor_scope(method: Method, storage: str, reduce: str, dtype: torch.dtype) -> None:
    if storage != "auto":
        raise UserError(
            f"scope='tensor' merges every tensor inside backward and keeps no J, so storage='{storage}' has no "
            "meaning: leave storage at 'auto', or use scope='global'"
        )
    if dtype != torch.float32:
        raise UserError(f"scope='tensor' keeps no J that dtype={dtype} could be of: use torch.float32")
    if reduce == "sketch":
        raise UserError(
            "scope='tensor' with reduce='sketch': a sketch for each tensor would be as large as the tensors; use "
            "reduce='exact' or 'local'"
        )
    if not method.by_tensor:
        raise UserError(
            "scope='tensor' works with pcgrad and gradvac: a TorchJD solver would run on the host once for each "
            "tensor; use scope='global'"
        )


def find_ranks(reduce: str) -> Ranks:
    return Alone() if reduce == "local" else Together()


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
