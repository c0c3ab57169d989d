"""Which implementation of a row-wise operation a call takes."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Collection
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastmtl_kernels._native import why_unavailable

RowImpl = Literal["auto", "reference", "triton", "cpp"]
# Fastest first: "auto" takes the first that can be used.
IMPLS = ("cpp", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select(impl: str, rows: Tensor, *others: Tensor | None) -> str:
    """The implementation for these tensors, which are on one device.

    Raises:
        ValueError: impl is no implementation.
        RuntimeError: the implementation asked for cannot be used here; the message says why.
    """
    dtypes = {tensor.dtype for tensor in (rows, *others) if tensor is not None}
    if impl == "auto":
        return next(name for name in IMPLS if not unsupported_reason(name, rows.device, dtypes))
    if impl not in IMPLS:
        raise ValueError(f"impl must be 'auto', {', '.join(map(repr, IMPLS))}, got {impl!r}")
    reason = unsupported_reason(impl, rows.device, dtypes)
    if reason:
        raise RuntimeError(f"impl={impl!r} cannot be used here: {reason}")
    return impl


def backend(operation: str, impl: str) -> ModuleType | None:
    """The module of an implementation, None for the reference, which needs no functions of its own for backward."""
    return None if impl == "reference" else importlib.import_module(f"fastmtl_kernels.{operation}.{impl}")


def unsupported_reason(impl: str, device: torch.device, dtypes: Collection[torch.dtype] = ()) -> str:
    """The reason why an implementation cannot be used on a device and with these dtypes, "" where it can."""
    if impl == "reference":
        return ""
    kernels, wanted = ("the C++ kernels", "cpu") if impl == "cpp" else ("the Triton kernels", "cuda")
    if device.type != wanted:
        return f"{kernels} take {wanted.upper()} tensors, not {device.type}"
    wrong = [dtype for dtype in dtypes if dtype not in DTYPES]
    if wrong:
        return f"{kernels} take float32, bfloat16 and float16, not {wrong[0]}"
    return why_unavailable() if impl == "cpp" else why_no_triton()


@cache
def why_no_triton() -> str:
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
