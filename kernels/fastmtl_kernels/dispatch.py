"""The implementations of every operation, and the selection of one for a call.

`OPERATIONS` lists the implementations of each operation, fastest first. impl="auto" selects the
first that supports the call; an implementation that the caller names never falls back to another.
The operation imports the module of an implementation only when it is selected, since not every
machine has Triton.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels import _native

RowImpl = Literal["auto", "reference", "triton", "cpp"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The most columns of an attention head. A program of the Triton kernels keeps a whole head in
# shared memory; 128 columns of float32 would exceed that of an A100.
MAX_HEAD_DIM = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
# The most columns between the two linear maps of an adapter. A program of the Triton kernels keeps
# whole rows of this width in registers; exact float32 products take two registers per number.
MAX_RANK = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}
MAX_CUDA_TASKS = 64


class Limit(NamedTuple):
    """A limit of an implementation on a size of the call, such as the number of tasks.

    size: the name of the size, a keyword of `select`. largest: the largest supported value for each
    dtype. message: the error message, a format string with `largest`, `value` and `dtype`.
    names_argument: whether the message names the argument that is too large; the error is then a
    ValueError, else a RuntimeError.
    """

    size: str
    largest: Mapping[torch.dtype, int]
    message: str
    names_argument: bool = False


@dataclass(frozen=True, eq=False)
class Candidate:
    """One implementation of an operation, with its requirements.

    impl: the name for `impl=`. kernels: the name in error messages. device: the type of device that
    it needs ("cpu" or "cuda"), or "" for an implementation that supports every device and dtype.
    dtypes: the supported dtypes, if `device` is not "".
    """

    impl: str
    description: str
    kernels: str = ""
    device: str = ""
    dtypes: Collection[torch.dtype] = DTYPES
    limits: tuple[Limit, ...] = ()


class Implementation(NamedTuple):
    """One implementation of an operation, on one kind of device.

    impl: the name for `impl=`. available: whether it can be used. reason: the reason why it cannot
    be used, or its description if it can. auto: whether `impl="auto"` selects it.
    """

    impl: str
    available: bool
    reason: str
    auto: bool


_CPP = Candidate("cpp", "C++, vectorised and threaded", "the C++ kernels", "cpu")
_CUDA = Candidate(
    "cuda",
    f"CUDA, tensor lists, up to {MAX_CUDA_TASKS} tasks",
    "the CUDA kernels",
    "cuda",
    limits=(
        Limit(
            "tasks",
            dict.fromkeys(DTYPES, MAX_CUDA_TASKS),
            "the CUDA kernels take up to {largest} tasks, not {value}",
        ),
    ),
)
_TRITON = Candidate("triton", "Triton", "the Triton kernels", "cuda")
_TORCH = Candidate("torch", "matrix products by torch")
_PADDED = Candidate("padded", "plain torch on padded texts; no Triton kernel computes its position terms")
_REFERENCE = Candidate("reference", "plain torch")

_ONE_TENSOR = Limit(
    "tensors",
    dict.fromkeys(DTYPES, 1),
    "the Triton kernels take a [T, P] tensor or lists of one tensor, not lists of {value}",
)
_HEAD_DIM = Limit(
    "head_dim",
    MAX_HEAD_DIM,
    "qkv must have head_dim <= {largest} in {dtype} for impl='triton', got {value}",
    names_argument=True,
)
_PAL_HEAD_DIM = _HEAD_DIM._replace(
    message="num_heads must give heads of at most {largest} columns in {dtype} for impl='triton', got {value}"
)
_RANK = Limit(
    "rank",
    MAX_RANK,
    "down must have a rank of at most {largest} in {dtype} for impl='triton', got {value}",
    names_argument=True,
)

_TASK_GRADIENTS = (
    _CPP,
    _CUDA,
    replace(_TRITON, description="Triton, one tensor for each task", limits=(_ONE_TENSOR,)),
    _REFERENCE,
)
_ROWS = (_CPP, _TRITON, _REFERENCE)
_MAPS_TRITON = replace(
    _TRITON,
    description=f"Triton, ranks up to {MAX_RANK[torch.bfloat16]}, in float32 {MAX_RANK[torch.float32]}",
    limits=(_RANK,),
)
_MAPS = (_MAPS_TRITON, _TORCH, _REFERENCE)
_WEIGHTS = (Candidate("reference", "plain torch, stays on the device"),)

OPERATIONS: dict[str, tuple[Candidate, ...]] = {
    "gramian": _TASK_GRADIENTS,
    "combine": _TASK_GRADIENTS,
    "combined_adamw": _ROWS,
    "pcgrad_weights": _WEIGHTS,
    "gradvac_weights": _WEIGHTS,
    "varlen_attention": (_CPP, replace(_TRITON, limits=(_HEAD_DIM,)), _REFERENCE),
    "disentangled_attention": (_CPP, _PADDED, _REFERENCE),
    "add_layer_norm": _ROWS,
    "embed_layer_norm": _ROWS,
    "dropout": _ROWS,
    "pool": _ROWS,
    "geglu": _ROWS,
    "low_rank": _MAPS,
    "lora": _MAPS,
    "pal": (replace(_MAPS_TRITON, limits=(_RANK, _PAL_HEAD_DIM)), _TORCH, _REFERENCE),
}


class Refusal(NamedTuple):
    """The reason why a candidate does not support a call. names_argument: see `Limit`."""

    reason: str
    names_argument: bool = False


def select(operation: str, impl: str, *tensors: Tensor | None, **sizes: int) -> str:
    """Return the name of the implementation for a call.

    impl: the caller's `impl`. tensors: the tensors of the call, on one device; the first must not
    be None; without tensors the device is the CPU. sizes: the sizes of the call, by the names that
    `Limit.size` uses.

    Raises:
        ValueError: the operation has no such implementation, or an argument is too large for it.
        RuntimeError: the implementation cannot be used here; the message gives the reason.
    """
    device = tensors[0].device if tensors and tensors[0] is not None else torch.device("cpu")
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if impl == "auto":
        for candidate in OPERATIONS[operation]:
            if refusal(candidate, device, dtypes, sizes) is None:
                return candidate.impl
    refused = refusal(_candidate(operation, impl), device, dtypes, sizes)
    if refused is None:
        return impl
    if refused.names_argument:
        raise ValueError(refused.reason)
    raise RuntimeError(f"impl={impl!r} cannot be used here: {refused.reason}")


def unsupported_reason(
    operation: str, impl: str, device: torch.device, dtypes: Collection[torch.dtype] = (), **sizes: int
) -> str:
    """Return the reason why an implementation does not support a call, "" if it does.

    device, dtypes: those of the call's tensors. sizes: as for `select`.
    """
    refused = refusal(_candidate(operation, impl), device, dtypes, sizes)
    return "" if refused is None else refused.reason


def implementations(device: str | torch.device = "cpu") -> dict[str, list[Implementation]]:
    """List every implementation of every operation for float32, bfloat16 and float16 on a device.

    Returns:
        The implementations by the name of the operation, fastest first.
    """
    on = torch.device(device)
    listed = {}
    for operation, candidates in OPERATIONS.items():
        refused = {candidate: refusal(candidate, on, (), {}) for candidate in candidates}
        auto = next(candidate for candidate in candidates if refused[candidate] is None)
        listed[operation] = [
            Implementation(c.impl, reason is None, c.description if reason is None else reason.reason, c is auto)
            for c, reason in refused.items()
        ]
    return listed


def refusal(
    candidate: Candidate, device: torch.device, dtypes: Collection[torch.dtype], sizes: Mapping[str, int]
) -> Refusal | None:
    """Return the reason why a candidate does not support a call, None if it does."""
    kernels = candidate.kernels
    if not candidate.device:
        return None
    if device.type != candidate.device:
        return Refusal(f"{kernels} take {candidate.device.upper()} tensors, not {device.type}")
    for dtype in dtypes:
        if dtype not in candidate.dtypes:
            return Refusal(f"{kernels} take float32, bfloat16 and float16, not {dtype}")
        for limit in candidate.limits:
            value, largest = sizes.get(limit.size, 0), limit.largest[dtype]
            if value > largest:
                reason = limit.message.format(largest=largest, value=value, dtype=dtype)
                return Refusal(reason, limit.names_argument)
    missing = _missing(candidate.impl, device)
    return Refusal(missing) if missing else None


def _candidate(operation: str, impl: str) -> Candidate:
    candidates = OPERATIONS[operation]
    for candidate in candidates:
        if candidate.impl == impl:
            return candidate
    names = ", ".join(repr(candidate.impl) for candidate in candidates)
    raise ValueError(f"impl must be 'auto', {names}, got {impl!r}")


def _missing(impl: str, device: torch.device) -> str:
    """Return the reason why the library of an implementation cannot be used, "" if it can."""
    match impl:
        case "cpp":
            return _native.why_unavailable()
        case "cuda":
            return _native.why_no_cuda(device)
        case _:
            return why_no_triton()


@cache
def why_no_triton() -> str:
    """Return the reason why Triton cannot be used here, "" if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken package may raise anything
        return f"triton cannot be imported ({error}); `pip install triton` installs it on Linux"
    # Triton compiles a launcher for each kernel.
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "triton needs a C compiler: CC, gcc or clang"
    return ""
