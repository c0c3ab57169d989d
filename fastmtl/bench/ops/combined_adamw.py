"""combined_adamw: a clipped step of AdamW from task gradients of an encoder's size.

It is compared with combine, clip_grad_norm_ and torch's fused AdamW, called one after the other.
combined_adamw gets the norm for clipping from the Gramian; the other implementation computes the
norm of combine's result. Every implementation has its own weights and moments, and its first step
is compared with the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.bench.ops.case import EAGER, Case, Run, Tensors, Way, Work, ours
from fastmtl.bench.ops.gramian import task_gradients
from fastmtl.bench.sizes import SEED, Size
from fastmtl_kernels import combine, combined_adamw, gramian

# This rate is so large that a step changes the weights by their own size, which makes an error
# visible.
LR = 0.5
MAX_NORM = 1.0


def cases(size: Size) -> list[Case]:
    grads = task_gradients(size)
    tasks, columns = grads.shape
    weights = torch.linspace(-1, 1, tasks, device=grads.device)
    norm = float((weights @ gramian(grads) @ weights).sqrt())
    scale = min(MAX_NORM / (norm + 1e-6), 1.0)
    generator = torch.Generator(grads.device).manual_seed(SEED)

    def start(factor: float) -> Tensor:
        return factor * torch.randn(columns, generator=generator, device=grads.device)

    # The moments are as large as the clipped gradient would make them.
    share = scale * norm / columns**0.5
    tensors = {"params": start(1.0), "exp_avgs": start(0.1 * share), "exp_avg_sqs": 1e-3 * start(share).square()}

    def fastmtl(impl: str) -> Run:
        kept: list[Tensor] = []
        steps = 0

        def run(t: Tensors, _: float) -> Tensor:
            nonlocal steps
            if not kept:
                kept.extend(t[name].clone() for name in tensors)
            steps += 1
            factors = (weights * scale).to(kept[0].dtype)
            combined_adamw(t["grads"], factors, *kept, step=steps, lr=LR, impl=impl)  # type: ignore[arg-type]
            return kept[0]

        return run

    def eager() -> Run:
        made: list[tuple[Tensor, torch.optim.AdamW]] = []

        def run(t: Tensors, _: float) -> Tensor:
            if not made:
                parameter = t["params"].clone().requires_grad_()
                parameter.grad = torch.empty_like(parameter)
                made.append((parameter, torch.optim.AdamW([parameter], lr=LR, fused=True)))
                made[0][1].state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": t["exp_avgs"].clone(),
                    "exp_avg_sq": t["exp_avg_sqs"].clone(),
                }
            parameter, optimizer = made[0]
            assert parameter.grad is not None
            combine(t["grads"], weights, parameter.grad)
            torch.nn.utils.clip_grad_norm_([parameter], MAX_NORM)
            optimizer.step()
            return parameter.detach()

        return run

    return [
        Case(
            "combined_adamw",
            f"{tasks} tasks x {columns:,} numbers",
            {"grads": grads, **tensors},
            lambda t, dropout: fastmtl("reference")(t, dropout),
            [*ours(grads.device, "combined_adamw", fastmtl), Way(EAGER, eager)],
            {"forward": Work(grads.nbytes + 6 * tensors["params"].nbytes, (2 * tasks + 14) * columns)},
        )
    ]
