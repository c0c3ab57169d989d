"""Gradient methods: from a Gramian to the weight of each task's gradient. A new method is one class here and its name
in METHODS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastmtl.errors import unknown_name
from fastmtl_kernels import gradvac_weights, pcgrad_weights

Reduction = Literal["sum", "mean"]


class Method(Protocol):
    """Weights of one step after another; `state` is what it carries between them, JSON-ready."""

    def weights(self, gram: Tensor, order: Tensor, reduction: Reduction) -> Tensor:
        """G [T, T] float32, order [T, T] int64 on its device -> weights [T]. A G that is not finite changes no state:
        its step is skipped.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PCGrad:
    """Yu et al. 2020, Algorithm 1, in coefficients (see fastmtl_kernels.pcgrad_weights)."""

    def weights(self, gram: Tensor, order: Tensor, reduction: Reduction) -> Tensor:
        return pcgrad_weights(gram, order=order, reduction=reduction)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class GradVac:
    """Wang et al. 2021, Algorithm 1: target cosines follow the seen ones as a moving average, beta 0.01, from 0."""

    BETA = 0.01

    def __init__(self) -> None:
        self._target: Tensor | None = None

    def weights(self, gram: Tensor, order: Tensor, reduction: Reduction) -> Tensor:
        target = torch.zeros_like(gram) if self._target is None else self._target.to(gram.device)
        weights, cosines = gradvac_weights(gram, target, order=order, reduction=reduction)
        self._target = torch.where(gram.isfinite().all(), target.lerp(cosines, self.BETA), target)
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {"target": None if self._target is None else self._target.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target = None if state["target"] is None else torch.tensor(state["target"], dtype=torch.float32)


METHODS: dict[str, type[Method]] = {"pcgrad": PCGrad, "gradvac": GradVac}


def find_method(name: str) -> Method | None:
    """The method of a name, None for `sum`, which needs no Gramian."""
    if name == "sum":
        return None
    if name not in METHODS:
        raise unknown_name("gradient method", name, ["sum", *METHODS])
    return METHODS[name]()


def draw_order(num_tasks: int, seed: int, step: int) -> Tensor:
    """A permutation of the tasks for each row, int64 [T, T], the same on every rank: drawn on the host from (seed,
    step).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])
