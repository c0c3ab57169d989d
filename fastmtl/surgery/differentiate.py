"""Gradients by autograd, returned instead of added to `.grad`; UserError if not supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl.errors import UserError

# A part of torch's error about a compiled function whose backward runs twice.
_DONATED = "compiled with non-empty donated buffers"
# Parts of torch's and DeepSpeed's errors about checkpointing that calls backward in backward.
_REENTRANT = ("use_reentrant=True", "Checkpointing is not compatible with .grad()")


# A scalar, and the factor of its gradient.
Term = tuple[Tensor, float]


def differentiate(
    terms: Sequence[Term],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    names: Mapping[int, str],
    *,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of scalar * factor over the terms, one for each input.

    inputs: tensors, or edges of the graph.

    None for an input that the sum does not depend on.

    The sum itself is not computed: the factors are the output gradients with which autograd starts.

    names: names of the inputs by id, for messages. retain_graph: True if the graph is needed again.
    Raises UserError for re-entrant checkpointing and for sparse gradients.
    """
    try:
        scalars = [scalar for scalar, _ in terms]
        factors = [torch.full((), factor, dtype=scalar.dtype, device=scalar.device) for scalar, factor in terms]
        found = torch.autograd.grad(scalars, inputs, factors, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if any(sign in str(error) for sign in _REENTRANT):
            raise UserError(
                "re-entrant activation checkpointing runs a backward of its own, without task gradients: use "
                'model.gradient_checkpointing_enable({"use_reentrant": False}), or '
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            ) from None
        if _DONATED in str(error):
            raise UserError(
                "the backward of a compiled function runs several times here, for a pass per task or a comparison with "
                "one (verify_every), and torch.compile has freed its buffers after the first: set "
                "torch._functorch.config.donated_buffer = False before compiling"
            ) from None
        raise
    for parameter, gradient in zip(inputs, found, strict=True):
        if gradient is not None and gradient.layout != torch.strided and isinstance(parameter, Tensor):
            raise UserError(
                f"parameter {names[id(parameter)]} of shape {tuple(parameter.shape)} gets a sparse gradient: make the "
                "embedding with sparse=False, and give its weight in GradientSurgery(..., sparse=[...]) to keep only "
                "the rows that occur"
            )
    return found


def leaves_of(loss: Tensor) -> set[int]:
    """Return the ids of the tensors that would get a gradient from `loss.backward()`.

    Only the graph is read; no backward runs.
    """
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
