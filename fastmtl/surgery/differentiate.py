"""autograd for gradients that surgery needs at hand, and the sentence where it cannot give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UserError

# What torch and DeepSpeed say of checkpointing that calls backward inside backward.
_REENTRANT = ("use_reentrant=True", "Checkpointing is not compatible with .grad()")


# A scalar, and what its gradient is multiplied with.
Term = tuple[Tensor, float]


def differentiate(
    terms: Sequence[Term], inputs: Sequence[Tensor], names: Mapping[int, str], *, again: bool = False
) -> tuple[Tensor | None, ...]:
    """Return gradients of the sum of the terms by `inputs`, None for those that it does not depend on. The sum is not
    made: autograd starts from the factors.

    names: of the inputs by id, for messages. again: whether the graph is needed for another call.
    Raises UserError for re-entrant checkpointing and for sparse gradients.
    """
    try:
        scalars = [scalar for scalar, _ in terms]
        factors = [torch.full((), factor, dtype=scalar.dtype, device=scalar.device) for scalar, factor in terms]
        found = torch.autograd.grad(scalars, inputs, factors, retain_graph=again, allow_unused=True)
    except RuntimeError as error:
        if any(sign in str(error) for sign in _REENTRANT):
            raise UserError(
                "re-entrant activation checkpointing runs a backward of its own, which gives no task gradients: use "
                'model.gradient_checkpointing_enable({"use_reentrant": False}), or '
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            ) from None
        raise
    for parameter, gradient in zip(inputs, found, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise UserError(
                f"parameter {names[id(parameter)]} of shape {tuple(parameter.shape)} gets a sparse gradient: make the "
                "embedding with sparse=False, and give its weight in GradientSurgery(..., sparse=[...]) to keep only "
                "the rows that occur"
            )
    return found


def leaves_of(loss: Tensor) -> set[int]:
    """Return the ids of the tensors that a backward of `loss` would give a gradient, without running it."""
    found, seen, waiting = set[int](), set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.add(id(node.variable))  # type: ignore[attr-defined]
        waiting += [following for following, _ in node.next_functions]
    return found
