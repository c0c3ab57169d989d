"""Autograd function that passes gradients computed elsewhere to DeepSpeed's hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast


class Surrogate(torch.autograd.Function):
    """Function whose value is 0, and whose gradient for parameter k is `merged[k]`.

    A backward of the value calls every hook of DeepSpeed with these gradients.

    scaled_by: the part of DeepSpeed's loss scale that the gradients already contain. None if there
    is no loss scale: then the gradients stay as they are, and may have the parameters' dtype.
    """

    @staticmethod
    def forward(ctx: Any, merged: list[Tensor], scaled_by: float | None, *parameters: Tensor) -> Tensor:
        ctx.merged, ctx.scaled_by = merged, scaled_by
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return merged[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        merged, ctx.merged = ctx.merged, None
        if ctx.scaled_by is not None:
            torch._foreach_mul_(merged, scale / ctx.scaled_by)
        gradients = [cast(gradient, dtype) for gradient, dtype in zip(merged, ctx.dtypes, strict=True)]
        merged.clear()  # the caller's list
        return None, None, *gradients
