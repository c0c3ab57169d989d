"""Rows of several tasks, and features: steps of two ranks, and their reference of T passes.

The steps run in the launch of deepspeed_cases.py. The reference is one process with the joined
batch, where each task has a backward pass of its own, without any rule.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.methods.order import draw_order
from fastmtl_kernels import pcgrad_weights

TASKS, STEPS, LR = ["depth", "normals", "kind"], 2, 0.1
# By micro-batch of three rows. With one micro-batch per rank, rows of the second have at most one
# task.
SETS = [
    ["depth normals kind", "depth", "normals"],
    ["depth", "", "kind"],
    ["normals", "kind", "depth"],
    ["depth normals", "kind", "depth normals kind"],
]
ROWS = [torch.tensor([[name in row.split() for name in TASKS] for row in part]) for part in SETS]
INPUTS = torch.randint(0, 9, (len(SETS), 3, 4), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """Steps of surgery. target: a ZeRO stage, "group" for a torch optimizer, or "fully_shard"."""

    target: int | str
    accumulation: int = 1
    features: bool = False
    storage: Any = "auto"
    precision: str = "fp32"

    @property
    def name(self) -> str:
        kind = "features" if self.features else "several"
        return f"{kind}-{self.target}-acc{self.accumulation}-{self.storage}-{self.precision}"


CASES = [
    Case(0),
    Case(1, 2, storage="kept"),
    Case(2, 2),
    Case(3, 2),
    Case("group", 2),
    Case("fully_shard", 2),
    *(Case(target, features=True) for target in (0, 1, "group", "fully_shard")),
    Case(2, 2, features=True, precision="bf16"),
    Case(3, 2, features=True),
]


class Mixer(nn.Module):
    """A module without a rule, which has a module with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.inner = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.factor).tanh() + x


class Net(nn.Module):
    """A trunk whose outputs [B, 6] the heads of all tasks read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 6), nn.LayerNorm(6), Mixer(), nn.Linear(6, 6)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(6, 2) for name in TASKS})

    def forward(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z = self.trunk(ids)
        return {name: head(z) for name, head in self.heads.items()}, z


def losses_of(outputs: dict[str, Tensor], part: int) -> Losses:
    wanted = (INPUTS[part, :, :2] % 3).float() - 1
    return {
        name: ((outputs[name].to(wanted.dtype) - wanted)[ROWS[part][:, k]].square().sum(), int(ROWS[part][:, k].sum()))
        for k, name in enumerate(TASKS)
    }


def run_steps(net: Net, target: Any, case: Case, rank: int, step_fn: Callable[[], object]) -> list[Any]:
    """Run a rank's micro-batches in each step, and return the reports."""
    surgery = GradientSurgery(
        target, tasks=TASKS, model=net.trunk, shared=list(net.trunk.parameters()), storage=case.storage, seed=3
    )

    def loss_fn(part: int, model: Any) -> Any:
        rows = nullcontext() if case.features else surgery.rows(ROWS[part])
        with rows:
            outputs, z = (net if model is None else model)(INPUTS[part])
        losses = losses_of(outputs, part)
        return (losses, z) if case.features else losses

    parts, infos = [rank * case.accumulation + a for a in range(case.accumulation)], []
    for _ in range(STEPS):
        infos.append(surgery.run(parts, loss_fn, counts(case), features=case.features))
        step_fn()
    surgery.detach()
    return infos


def counts(case: Case) -> dict[str, int]:
    return dict(zip(TASKS, torch.cat(ROWS[: 2 * case.accumulation]).sum(0).tolist(), strict=True))


def expected(case: Case) -> dict[str, Tensor]:
    """Return the weights after the steps, from T backward passes in float64."""
    net = Net().double()
    shared, own, acc = list(net.trunk.parameters()), list(net.heads.parameters()), case.accumulation
    # With features, the micro-batches that ranks run at the same time have weights of their own.
    groups = [[a, acc + a] for a in range(acc)] if case.features else [list(range(2 * acc))]
    for step in range(1, STEPS + 1):
        total = [torch.zeros_like(parameter) for parameter in (*shared, *own)]
        for parts in groups:
            found = [net(INPUTS[part]) for part in parts]
            losses = [losses_of(outputs, part) for (outputs, _), part in zip(found, parts, strict=True)]
            sums = [torch.stack([of_part[name][0] for of_part in losses]).sum() for name in TASKS]
            means = [total / count for total, count in zip(sums, counts(case).values(), strict=True)]
            inputs = [z for _, z in found] if case.features else shared
            gradients = [torch.autograd.grad(mean, inputs, retain_graph=True) for mean in means]
            jacobian = torch.stack([torch.cat([g.flatten() for g in of_task]) for of_task in gradients])
            weights = pcgrad_weights((jacobian @ jacobian.t()).float(), draw_order(3, 3, step)).double()
            merged = [torch.einsum("t,t...->...", weights, torch.stack(g)) for g in zip(*gradients, strict=True)]
            if case.features:
                merged = list(torch.autograd.grad(inputs, shared, merged, retain_graph=True))
            merged += torch.autograd.grad(torch.stack(means).sum(), own)
            total = [before + gradient for before, gradient in zip(total, merged, strict=True)]
        for parameter, gradient in zip([*shared, *own], total, strict=True):
            parameter.data -= LR * gradient
    return net.state_dict()


def run_all(rank: int, keep: Callable[[Any, str], None], save: Callable[[dict[str, Tensor], str], None]) -> None:
    """Run every case on this rank; keep(engine, name) saves the weights and ends the engine."""
    import deepspeed

    for case in CASES:
        net = Net()
        if case.target == "fully_shard":
            fully_shard(net.trunk[4])
            fully_shard(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        if isinstance(case.target, str):

            def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            run_steps(net, optimizer, case, rank, step)
            state = net.state_dict().items()
            save({name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state}, case.name)
            continue
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": case.accumulation,
            "zero_optimization": {"stage": case.target},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": case.precision == "bf16"},
        }
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        run_steps(net, engine, case, rank, engine.step)
        keep(engine, case.name)
