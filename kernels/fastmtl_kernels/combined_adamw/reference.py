"""Reference of combined_adamw in plain torch: it defines the result and runs on any device.

    g = sum_t weights[t] J[t]
    m += (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

J is T lists of K tensors. p (model weights), m and v (moments) are K tensors each, float32 or
float64. g is computed in their dtype, a chunk of columns at a time. No limits on T, K and P.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2, as
torch.optim.AdamW implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Columns per step, so that the merged gradient stays small beside J.
_CHUNK = 1 << 18


class Update(NamedTuple):
    """The scalars of one AdamW step, computed from its settings.

    decay = 1 - lr weight_decay, beta1_left = 1 - beta1, beta2_left = 1 - beta2,
    step_size = lr / (1 - beta1^step), root = 1 / sqrt(1 - beta2^step).
    """

    decay: float
    beta1_left: float
    beta2: float
    beta2_left: float
    step_size: float
    root: float
    eps: float

    @classmethod
    def at(cls, step: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Update:
        beta1, beta2 = betas
        root = (1 - beta2**step) ** -0.5
        return cls(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), root, eps)


class Written(NamedTuple):
    """The tensors that a step updates for one model weight.

    param, exp_avg, exp_avg_sq: the weight and its moments, of one dtype. copy: the 16-bit copy of
    param, or None.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None


def combined_adamw(
    grads: Sequence[Sequence[Tensor]],
    weights: Tensor,
    targets: Sequence[Written],
    update: Update,
    slots: Tensor | None,
) -> None:
    """Take one AdamW step for every target, in place.

    grads: T lists of one gradient per target. weights: [T]. slots: None, or int32 [V] for a single
    target, an embedding table of V rows. Row v then has the gradients grads[t][0][slots[v]], or
    zero if slots[v] < 0.
    """
    for target, *same in zip(targets, *grads, strict=True):
        param = target.param
        factors = weights.to(param.dtype).unbind()
        width = 1 if slots is None else param.shape[1]
        flat = [tensor.reshape(-1, width) for tensor in (param, *target[1:3])]
        copy = None if target.copy is None else target.copy.view(-1, width)
        rows = [tensor.reshape(-1, width) for tensor in same]
        step = max(_CHUNK // max(width, 1), 1)
        for begin in range(0, len(flat[0]), step):
            some = slice(begin, begin + step)
            if slots is None:
                parts = [gradient[some] for gradient in rows]
            else:
                present = slots[some] >= 0
                chosen = slots[some][present].long()
                parts = [torch.zeros_like(flat[0][some]) for _ in rows]
                for part, gradient in zip(parts, rows, strict=True):
                    part[present] = gradient[chosen].to(part.dtype)
            merged = torch.zeros_like(flat[0][some])
            for factor, part in zip(factors, parts, strict=True):
                merged.addcmul_(part.to(merged.dtype), factor)
            p, m, v = (tensor[some] for tensor in flat)
            m.lerp_(merged, update.beta1_left)
            v.mul_(update.beta2).addcmul_(merged, merged, value=update.beta2_left)
            p.mul_(update.decay).addcdiv_(m, (v.sqrt() * update.root).add_(update.eps), value=-update.step_size)
            if copy is not None:
                copy[some] = p.to(copy.dtype)
