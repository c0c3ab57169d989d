"""Checks of what GradientSurgery is given: names, weights, parameters, and options that fit together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError, quoted, unknown_name
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.ranks.collectives import world_size
from fastmtl.surgery.targets.protocol import Target

Storage = Literal["auto", "stacked", "kept", "replay"]
Scope = Literal["global", "tensor"]
Reduce = Literal["exact", "local", "sketch"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SKETCH_SIZE = 32_768


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Raises UserError for none, and for a name given twice."""
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UserError(f"tasks: give the list of their names, got {tasks!r}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: {name} is there twice")
    return names


def check_task_weights(given: Mapping[str, float], tasks: list[str], argument: str = "task_weights") -> list[float]:
    """Every task's weight in their order, 1 by default. Raises UserError, naming `argument`, for an unknown task and a
    bad number.
    """
    for name, weight in given.items():
        if name not in tasks:
            raise unknown_name(f"task in {argument}", name, tasks)
        if not isinstance(weight, Real) or not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{argument}: {name}: {quoted(weight)} must be a number that is not negative")
    return [float(given.get(name, 1.0)) for name in tasks]


def find_shared(
    target: Target, shared: Sequence[nn.Parameter] | None, sparse: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """The trainable ones, each once, by default all of the target. Raises UserError for parameters that are none of the
    target's, and for sparse ones that are no shared tables.
    """
    if shared is None:
        inside = target.parameters
    else:
        shared = check_parameters("shared", shared)
        trainable = {id(p) for p in target.parameters}
        inside = target.arranged([p for p in shared if id(p) in trainable])
        strangers = [whole_shape(p) for p in shared if p.requires_grad and id(p) not in trainable]
        if strangers:
            raise UserError(
                f"shared: {len(strangers)} parameters are not the target's (the first has shape "
                f"{tuple(strangers[0])}): make the target of the model that they are of"
            )
    known = {id(p) for p in inside}
    for table in sparse:
        if table.requires_grad and id(table) not in known:
            raise UserError(f"sparse: a parameter of shape {tuple(whole_shape(table))} is not among the shared ones")
        if len(whole_shape(table)) != 2:
            raise UserError(f"sparse: an embedding table has two dimensions, got {tuple(whole_shape(table))}")
    return list(inside)


def check_parameters(argument: str, given: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return each parameter once, in the order given. Raises UserError, naming `argument`, for what is no parameter."""
    way_out = f"give parameters, for example {argument}=model.encoder.parameters()"
    if isinstance(given, Tensor | nn.Module | str) or not isinstance(given, Iterable):
        raise UserError(f"{argument} is of type {type(given).__name__}, not a list: {way_out}")
    found = {}
    for one in given:
        if isinstance(one, tuple):
            raise UserError(f"{argument} has pairs of names and parameters: use parameters() for named_parameters()")
        if not isinstance(one, Tensor):
            raise UserError(f"{argument} has {quoted(one)}, which is no parameter: {way_out}")
        found[id(one)] = one
    return list(found.values())


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


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")


def check_sketch(sketch_size: int, sparse: Sequence[nn.Parameter]) -> None:
    """Raises UserError for a sketch that a table's row does not fit in."""
    for table in sparse:
        width = whole_shape(table)[1]
        if width > sketch_size:
            raise UserError(f"sketch_size={sketch_size} is less than a row of an embedding table: use {width} or more")
