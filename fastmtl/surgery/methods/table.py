"""Gradient methods: from a Gramian to the weight of each task's gradient. A new method is one class here and its name
in METHODS; TorchJD's come by their own names from `torchjd_methods`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastmtl.errors import UserError, listed, quoted, unknown_name
from fastmtl.surgery.methods import torchjd as torchjd_methods
from fastmtl_kernels import gradvac_weights, pcgrad_weights

Reduction = Literal["sum", "mean"]


class Method(Protocol):
    """Weights of one step after another.

    by_rank: whether each rank may solve for itself. by_tensor: whether it can solve inside backward, for each tensor.
    """

    by_rank: bool
    by_tensor: bool

    def weights(self, gram: Tensor, order: Tensor, index: int | None) -> Tensor:
        """G [T, T] float32, order int64 [T, T] on its device -> weights [T]. index: of the tensor whose Gramian this
        is, None for the global one. A G that is not finite changes no state: its step is skipped. Where `by_tensor`,
        it reads no number on the host and keeps its state at fixed addresses, so that it can be recorded.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: what is carried from step to step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PCGrad:
    """Yu et al. 2020, Algorithm 1, in coefficients (see fastmtl_kernels.pcgrad_weights)."""

    by_rank = by_tensor = True

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        self._reduction = reduction

    def weights(self, gram: Tensor, order: Tensor, index: int | None) -> Tensor:
        return pcgrad_weights(gram, order=order, reduction=self._reduction, check_order=False)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class GradVac:
    """Wang et al. 2021, Algorithm 1: target cosines follow the seen ones as a moving average, from 0.

    beta: share of the newest cosine in the average.
    """

    by_rank, by_tensor = False, True

    def __init__(self, *, reduction: Reduction = "sum", beta: float = 0.01) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
            raise UserError(f"gradient method gradvac: the option beta is {quoted(beta)}: give a number from 0 to 1")
        self._reduction, self._beta = reduction, beta
        self._targets: dict[str, Tensor] = {}

    def weights(self, gram: Tensor, order: Tensor, index: int | None) -> Tensor:
        key = "all" if index is None else str(index)
        if key not in self._targets:
            self._targets[key] = torch.zeros_like(gram)
        elif self._targets[key].device != gram.device:
            self._targets[key] = self._targets[key].to(gram.device)
        target = self._targets[key]
        weights, cosines = gradvac_weights(gram, target, order=order, reduction=self._reduction, check_order=False)
        # In place, here and in `load_state_dict`: what was recorded has the address.
        target.copy_(torch.where(gram.isfinite().all(), target.lerp(cosines, self._beta), target))
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {"targets": {key: target.tolist() for key, target in self._targets.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        given = {key: torch.tensor(rows, dtype=torch.float32) for key, rows in state["targets"].items()}
        for key, target in self._targets.items():
            target.copy_(given.pop(key, torch.zeros(())))
        self._targets.update(given)


METHODS: dict[str, type[PCGrad | GradVac]] = {"pcgrad": PCGrad, "gradvac": GradVac}


def method_names() -> list[str]:
    """Every name that `find_method` takes here."""
    return ["sum", *METHODS, *torchjd_methods.names()]


def find_method(name: str, reduction: Reduction = "sum", options: Mapping[str, Any] | None = None) -> Method | None:
    """The method of a name, None for `sum`, which needs no Gramian. options: what its class takes by keyword.

    Raises UserError for an unknown name or option.
    """
    options = dict(options or {})
    if not isinstance(name, str):
        raise UserError(f"gradient method: expected a name, got {quoted(name)}. Valid: {listed(method_names())}.")
    if reduction not in ("sum", "mean"):
        raise UserError(f"reduction must be sum or mean, got {reduction!r}")
    if name == "sum":
        if options:
            raise UserError(f"gradient method sum takes no options, got {', '.join(options)}")
        return None
    if name in METHODS:
        allowed = [key for key in inspect.signature(METHODS[name]).parameters if key != "reduction"]
        for key in options:
            if key not in allowed:
                raise unknown_name(f"option of {name}", key, allowed)
        return METHODS[name](reduction=reduction, **options)
    if torchjd_methods.knows(name):
        if reduction != "sum":
            raise UserError(f"reduction={reduction!r} is for pcgrad and gradvac; {name} scales its weights itself")
        return torchjd_methods.TorchJDMethod(name, options)
    if torchjd_methods.why_unavailable():
        raise UserError(
            f"{unknown_name('gradient method', name, ['sum', *METHODS])} ({torchjd_methods.why_unavailable()})"
        )
    raise unknown_name("gradient method", name, method_names())


def draw_order(num_tasks: int, seed: int, step: int) -> Tensor:
    """A permutation of the tasks for each row, int64 [T, T], the same on every rank: drawn on the host from (seed,
    step).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])
