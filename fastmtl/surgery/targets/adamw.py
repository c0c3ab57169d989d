"""AdamW that takes J in place of a merged gradient, for a training loop without DeepSpeed.

GradientSurgery with `storage="stacked"` passes J and the T task weights. `step` merges, clips and
updates in one pass over J, parameters and moments, without a merged gradient in memory. Without
surgery, the same update uses `.grad`.

Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019;
fastmtl_kernels.combined_adamw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.jacobian.compact_rows import Rows
from fastmtl.surgery.norms import total_norm
from fastmtl_kernels import combined_adamw

_HALF = (torch.bfloat16, torch.float16)
_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Added to the norm, as torch.nn.utils.clip_grad_norm_ does.
_CLIP_EPS = 1e-6


@dataclass(frozen=True)
class TaskUpdate:
    """A step's gradients before merging, by parameter id.

    weights: [T] float32.
    dense: T task gradients per parameter, which the optimizer merges with `weights`.
    tables: gradients of embedding tables, already merged, as (ids [n], rows [n, d]).
    own: gradients of the parameters that are not shared.
    shared_norm: norm of the merged gradient of `dense` and `tables`.
    """

    weights: Tensor
    dense: Mapping[int, list[Tensor]]
    tables: Mapping[int, Rows] = field(default_factory=dict)
    own: Mapping[int, Tensor] = field(default_factory=dict)
    shared_norm: float = 0.0


class SurgeryAdamW(torch.optim.AdamW):
    """torch.optim.AdamW that reads task gradients, for GradientSurgery without DeepSpeed.

    After `surgery.run` or `surgery.backward` with stacked storage, `step()` updates from J, and
    `.grad` stays None. In several processes, and after `sum`, `replay`, `scope="tensor"` or a
    backward of your own, `step()` updates from `.grad`. A parameter without a gradient stays
    unchanged.

    Parameters in bfloat16 or float16 have float32 weights (`master` in the state) and moments; the
    parameter is the rounded copy of `master`. `state_dict()` loads into torch.optim.AdamW and vice
    versa. A state of torch.optim.AdamW has no `master`, so the weights start from those of the
    model.

    Args:
        params, lr, betas, eps, weight_decay: as for torch.optim.AdamW, including groups with values
            of their own.
        max_norm: clips the gradient of all parameters together, like
            torch.nn.utils.clip_grad_norm_, which would find no `.grad` here. Needs no extra pass
            over the gradient. None does not clip.

    Raises:
        UserError: amsgrad, maximize, capturable, differentiable, foreach or fused; parameters that
            are not contiguous or not real.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise UserError(f"max_norm must be above 0, got {max_norm}; None does not clip")
        self.max_norm = max_norm
        self.grad_norm: Tensor | None = None
        self._update: TaskUpdate | None = None
        try:
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"SurgeryAdamW: {error}") from None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        reason = _unsupported_reason(self.param_groups[-1])
        if reason:
            self.param_groups.pop()
            raise UserError(f"SurgeryAdamW: {reason}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm, "grad_norm": None, "_update": None}

    def take(self, update: TaskUpdate) -> None:
        """Set the gradients that the next `step` uses in place of `.grad`."""
        self._update = update

    def check_taken(self) -> None:
        """Raise UserError if the last step's gradients, which a new step replaces, are unused."""
        if self._update is not None:
            raise UserError(
                "the gradients of the last step are not used yet: call optimizer.step(), or optimizer.zero_grad() to "
                "drop them. Several micro-batches of one step go into one surgery.run, or backward(..., last=False)"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._update = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Sets `grad_norm` to the norm of the whole gradient before clipping, or to None without
        max_norm.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given, self._update = self._update, None
        update = self._from_grad()
        if given is not None:
            if update.own:
                raise UserError(
                    "there is a .grad beside the task gradients, and only one of them can be used: put a backward of "
                    "your own before surgery.run, not after it"
                )
            update = given
        scale = self._clip(update)
        for group in self.param_groups:
            self._step_group(group, update, scale)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of SurgeryAdamW or torch.optim.AdamW with the same parameters.

        Raises UserError for a state of another optimizer, and for AdamW with amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise UserError(
                        f"the optimiser's state is of AdamW with {option}, which SurgeryAdamW does not support"
                    )
        for state in state_dict["state"].values():
            if state and not {"step", *_MOMENTS} <= set(state):
                raise UserError(f"the optimiser's state has {', '.join(state)} and is not of AdamW")
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(f"SurgeryAdamW: {error}") from None
        self._update = None
        for group in self.param_groups:
            group.update(foreach=None, fused=None, capturable=False, differentiable=False)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(saved, chain.from_iterable(g["params"] for g in self.param_groups), strict=True):
            given = state_dict["state"].get(key)
            if not given:
                continue
            state = self.state[parameter]
            state["step"] = torch.tensor(float(given["step"]), dtype=torch.float32)
            if parameter.dtype in _HALF:  # torch has rounded the moments to the parameter's dtype
                values = {name: given[name] for name in _MOMENTS} | {"master": given.get("master", parameter)}
                for name, value in values.items():
                    state[name] = value.detach().to(parameter.device, torch.float32, copy=True).contiguous()

    def _from_grad(self) -> TaskUpdate:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(parameter.grad.is_sparse for parameter in found):
            raise UserError("SurgeryAdamW takes no sparse gradients: make the embedding with sparse=False")
        return TaskUpdate(torch.ones(1), {}, own={id(parameter): parameter.grad for parameter in found})

    def _clip(self, update: TaskUpdate) -> Tensor | None:
        """Return the factor that clips all gradients, a scalar tensor; None for no clipping."""
        self.grad_norm = None
        if self.max_norm is None:
            return None
        own = list(update.own.values())
        if own:
            norm = total_norm(own)
        elif update.dense or update.tables:
            norm = update.weights.new_zeros(())
        else:
            return None
        self.grad_norm = torch.hypot(norm, torch.full_like(norm, update.shared_norm))
        return (self.max_norm / (self.grad_norm + _CLIP_EPS)).clamp(max=1.0)

    def _step_group(self, group: dict[str, Any], update: TaskUpdate, scale: Tensor | None) -> None:
        """Update a group's parameters; those with the same `kind` share one call of the kernel."""
        alike: dict[tuple[Any, ...], list[tuple[nn.Parameter, list[Tensor]]]] = {}
        for parameter in group["params"]:
            key = id(parameter)
            if key in update.tables:
                self._step_table(group, parameter, update.tables[key], scale)
                continue
            gradients = update.dense.get(key) or ([update.own[key]] if key in update.own else None)
            if gradients is None:
                continue
            step = self._next_step(parameter)
            kind = step, key in update.dense, parameter.dtype, parameter.device
            alike.setdefault(kind, []).append((parameter, gradients))
        for (step, merges, _, device), chosen in alike.items():
            weights = update.weights if merges else torch.ones(1, device=device)
            lists = [list(task) for task in zip(*(gradients for _, gradients in chosen), strict=True)]
            self._call(group, lists, weights, scale, [parameter for parameter, _ in chosen], step)

    def _step_table(self, group: dict[str, Any], table: nn.Parameter, rows: Rows, scale: Tensor | None) -> None:
        ids, values = rows
        slots = torch.full((len(table),), -1, dtype=torch.int32, device=table.device)
        slots[ids] = torch.searchsorted(ids, ids, out_int32=True)  # the first of equal ids has the sum
        weights = torch.ones(1, device=table.device)
        self._call(group, [[values]], weights, scale, [table], self._next_step(table), slots)

    def _call(
        self,
        group: dict[str, Any],
        grads: list[list[Tensor]],
        weights: Tensor,
        scale: Tensor | None,
        parameters: list[nn.Parameter],
        step: float,
        slots: Tensor | None = None,
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        half = parameters[0].dtype in _HALF
        combined_adamw(
            grads,
            weights if scale is None else weights * scale.to(weights.device),
            [state["master"] for state in states] if half else parameters,
            *([state[name] for state in states] for name in _MOMENTS),
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            copies=parameters if half else None,
            slots=slots,
        )

    def _next_step(self, parameter: nn.Parameter) -> float:
        state = self.state[parameter]
        if not state:
            dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=dtype)
            if dtype != parameter.dtype:
                state["master"] = parameter.detach().to(dtype)
        state["step"] += 1
        return state["step"].item()


def _unsupported_reason(group: Mapping[str, Any]) -> str:
    """Return why a parameter group is unsupported, and a remedy; "" if it is supported."""
    for option in _REFUSED:
        if group.get(option):
            return f"it does not take {option}: leave that out, or use torch.optim.AdamW"
    if isinstance(group["lr"], Tensor):
        return "lr must be a number, since reading a tensor waits for the device at every step"
    for parameter in group["params"]:
        if sum(parameter is other for other in group["params"]) > 1:
            return f"a parameter of shape {tuple(parameter.shape)} is twice in one group: leave it out once"
        if not parameter.is_floating_point() or not parameter.is_contiguous():
            return (
                f"a parameter of shape {tuple(parameter.shape)} and {parameter.dtype} is not real or not contiguous: "
                "make it so (parameter.data = parameter.data.contiguous())"
            )
    return ""
