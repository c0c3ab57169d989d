"""Checks of the arguments of GradientSurgery: names, weights and options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import nn

from fastmtl.errors import UserError, quoted, unknown_name
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.ranks.collectives import world_size

Storage = Literal["auto", "stacked", "kept", "replay"]
Scope = Literal["global", "tensor"]
Reduce = Literal["exact", "local", "sketch"]
Passes = Literal["one", "per_task"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SKETCH_SIZE = 32_768
FEATURES_OUTSIDE = "features: run the forward outside of surgery.rows and without task_grads"
FEATURES_OF_ALL = "backward: give features for every micro-batch of a step, or for none"


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the names as a list. Raises UserError for an empty list and for a repeated name."""
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UserError(f"tasks: give the list of their names, got {tasks!r}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: {name} is listed twice")
    return names


def check_task_weights(given: Mapping[str, float], tasks: list[str], argument: str = "task_weights") -> list[float]:
    """Return one weight per task, in the order of `tasks`; 1 for a task without a given weight.

    Raises UserError, naming `argument`, for an unknown task and an invalid number.
    """
    for name, weight in given.items():
        if name not in tasks:
            raise unknown_name(f"task in {argument}", name, tasks)
        if not isinstance(weight, Real) or not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{argument}: {name}: {quoted(weight)} must be a number that is not negative")
    return [float(given.get(name, 1.0)) for name in tasks]


def check_model(model: object, passes: str, per_task_modules: Sequence[object], verify_every: int | None) -> None:
    """Raise UserError for an invalid value of one of these arguments of GradientSurgery."""
    _check_choice("passes", passes, ("one", "per_task"))
    if model is not None and not isinstance(model, nn.Module):
        raise UserError(f"model is of type {type(model).__name__}: give the trunk, a torch.nn.Module")
    if isinstance(per_task_modules, str | type | nn.Module):
        raise UserError("per_task_modules: give a list of classes, names or modules")
    if per_task_modules and (model is None or passes == "per_task"):
        raise UserError('per_task_modules: it needs `model`, and passes="one"')
    if verify_every is not None and (
        isinstance(verify_every, bool) or not isinstance(verify_every, int) or verify_every < 0
    ):
        raise UserError(f"verify_every must be None (first step), 0 (never) or a number of steps, got {verify_every!r}")


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
    """Return the storage to use: "stacked", "kept", "replay", or "none" where nothing is stored.

    "none" is for a sum of losses and for `scope="tensor"`.

    stacks: True if the target takes merged gradients. world: number of ranks; by default that of
    the process group, which may not be initialised yet.
    Raises UserError for an unknown value, and for an unsupported combination, with the reason and
    the nearest supported choice.
    """
    _check_choice("storage", storage, ("auto", "stacked", "kept", "replay"))
    _check_choice("scope", scope, ("global", "tensor"))
    _check_choice("reduce", reduce, ("exact", "local", "sketch"))
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
            f"storage='{storage}' needs every gradient at hand, which ZeRO 3, offload and fully_shard do not give: use "
            "storage='replay'"
        )
    chosen = storage if storage != "auto" else ("stacked" if stacks else "replay")
    if chosen != "stacked" and dtype != torch.float32:
        raise UserError(
            f"dtype={dtype} is for J, and storage='{chosen}' does not store J: use torch.float32, or storage='stacked' "
            "with ZeRO 0 to 2 without offload"
        )
    return chosen


def _check_tensor_scope(method: Method, storage: str, reduce: str, dtype: torch.dtype) -> None:
    if storage != "auto":
        raise UserError(
            f"scope='tensor' merges every tensor found backward and keeps no J, so storage='{storage}' has no "
            "meaning: leave storage at 'auto', or use scope='global'"
        )
    if dtype != torch.float32:
        raise UserError(f"dtype={dtype} is for J, and scope='tensor' does not store J: use torch.float32")
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


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")


def check_backward(storage: str, scope: str, *, joint: bool) -> None:
    """Raise UserError for storage "replay" and scope "tensor", which run the forward themselves."""
    if not joint and storage not in ("stacked", "kept"):
        reason = "scope='tensor'" if scope == "tensor" else "storage='replay' (ZeRO 3, offload, fully_shard)"
        raise UserError(f"backward: {reason} runs the forward itself; use run(micro_batches, loss_fn)")


def check_several_tasks(storage: str, scope: str, *, table: bool) -> None:
    """Raise UserError where rows of several tasks are unsupported. table: given as bool [B, T]."""
    if scope == "tensor":
        raise UserError(
            "rows: scope='tensor' needs all task gradients of a tensor in one backward pass, and rows of several tasks "
            "need several: use scope='global', or backward(losses, features=...)"
        )
    if storage == "replay" and world_size() > 1 and not table:
        raise UserError(
            "rows: with storage='replay' (ZeRO 3, offload) all ranks run the same passes, so that each rank must give "
            "rows of several tasks as bool [B, number of tasks]"
        )


def check_counts_given(counts: Mapping[str, int] | None, *, several: bool) -> None:
    """Raise UserError for a step of several micro-batches without `counts`."""
    if counts is None and several:
        raise UserError(
            "counts: give {task: rows in the whole step, over all ranks}, required with several micro-batches"
        )


def check_per_task(storage: str) -> None:
    """Raise UserError for storage "kept", which does not support one backward pass per task."""
    if storage == "kept":
        raise UserError(
            "storage='kept' needs one backward pass for all tasks, since it keeps the factors of the layers' "
            "gradients: give the trunk in GradientSurgery(..., model=...), or use storage='stacked'"
        )


def check_watched(*, joint: bool, scope: str, sketches: bool, recorded: bool, watched: bool) -> None:
    """Raise UserError where no Gramian of whole task gradients can be measured by layer."""
    if joint:
        raise UserError(
            'diagnose: the method "sum" takes no task gradients: use the method "equal", which gives the same sum and '
            "takes them"
        )
    if scope == "tensor":
        raise UserError(
            "diagnose: scope='tensor' has no task gradients of whole steps, since it merges in each micro-batch: use "
            "scope='global' while you measure"
        )
    if sketches:
        raise UserError(
            "diagnose: reduce='sketch' adds up all layers before it estimates cosines: use reduce='exact' or 'local'"
        )
    if recorded:
        raise UserError("diagnose: a step that runs as a CUDA graph is not measured: leave cuda_graphs out")
    if watched:
        raise UserError("diagnose: this GradientSurgery is measured already: call stop() of that diagnosis before")


def check_features_watched(*, watched: bool) -> None:
    """Raise UserError for a step with features in a measurement of layers."""
    if watched:
        raise UserError(
            "diagnose: a step with features takes no task gradients of the trunk's parameters: leave features out, or "
            "call stop() of the diagnosis before"
        )


def check_features_balanced(*, balanced: bool) -> None:
    """Raise UserError for a step with features and weights from the squares of task gradients."""
    if balanced:
        raise UserError(
            "balance: a step with features takes no task gradients of the trunk's parameters: leave features out, or "
            "leave balance out"
        )


def check_balance(method: str, storage: str, scope: str, reduce: str) -> None:
    """Raise UserError where no step has all columns of J, whose squares `balance` needs."""
    if method == "sum":
        raise UserError('balance: the method "sum" takes no task gradients: use "equal", which gives the same sum')
    if scope != "global" or reduce != "exact" or storage == "kept":
        raise UserError(
            "balance needs the columns of J, summed over all ranks: use storage='stacked' or 'replay', scope='global' "
            f"and reduce='exact', not storage={storage!r}, scope={scope!r} and reduce={reduce!r}"
        )


def check_cuda_graphs(cuda_graphs: object) -> None:
    """Raise UserError for True: surgery does not import CUDA graphs, so it expects a function."""
    if cuda_graphs is True:
        raise UserError(
            "cuda_graphs=True: surgery itself records nothing: pass cuda_graphs=fastmtl.cuda_graphs.record_merging"
        )


def check_sketch(sketch_size: int, sparse: Sequence[nn.Parameter]) -> None:
    """Raise UserError for a sketch smaller than a row of an embedding table."""
    for table in sparse:
        width = whole_shape(table)[1]
        if width > sketch_size:
            raise UserError(f"sketch_size={sketch_size} is less than a row of an embedding table: use {width} or more")
