"""The ranks of tests/surgery/test_sharded.py: every case of fully_shard (FSDP2) in one launch.

Usage: sharded_cases.py DIRECTORY [WORLD]
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # as transformers' model: before the ranks are forked
import torch.distributed as dist
from ranks import run_ranks
from sharded_nets import CASES, HYBRID, TASKS, Case, Net, counts, make_part
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastmtl.errors import TrainingError, UserError
from fastmtl.surgery import GradientSurgery, SurgeryAdamW
from fastmtl.surgery.losses import Losses

STEPS = 2


def shard(net: Net, case: Case) -> None:
    """Shard blocks and the whole net; the `mixed` net also has sharded layers with a rule."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if case.half else MixedPrecisionPolicy()
    options: dict[str, Any] = {"mp_policy": policy}
    if case.hybrid:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    trunk = net.trunk
    for module in [trunk.block, trunk.last] if case.net == "mixed" else trunk.bert.encoder.layer:
        fully_shard(module, **options)
    fully_shard(net, **options)


def loss_of(net: Net, surgery: GradientSurgery) -> Callable[[Any], Losses]:
    def loss_fn(rows: Any) -> Losses:
        with surgery.rows(rows[1]):
            return net(*rows)

    return loss_fn


def make_surgery(net: Net, case: Case, lr: float = 0.05) -> tuple[Any, GradientSurgery]:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    options: dict[str, Any] = {"model": net.trunk, "seed": 3, **dict(case.options)}
    return optimizer, GradientSurgery(optimizer, case.method, tasks=TASKS, **options)


def train(case: Case, parts: list[int], of: int) -> dict[str, Any]:
    """Return the first step's gradients, the last weights, and the reports, of sharded nets."""
    net = Net(case)
    shard(net, case)
    hooks = hooks_of(net)
    optimizer, surgery = make_surgery(net, case)
    found: dict[str, Any] = {"reports": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        info = surgery.run([make_part(step, part, of) for part in parts], loss_of(net, surgery), counts())
        found["reports"].append(report_of(info))
        if step == 0:
            found["gradients"] = whole((name, p.grad) for name, p in net.named_parameters())
        optimizer.step()
    surgery.detach()
    assert hooks_of(net) == hooks
    return found | {"weights": whole(net.named_parameters())}


def hooks_of(net: Net) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def train_alone(case: Case) -> dict[str, Any]:
    """Return what `train` returns for a net in one process and all rows in one micro-batch.

    With mixed precision, float32 weights are rounded to bfloat16 before each forward.
    """
    options = case.options if case.method == "sum" or case.options else (("storage", "replay"),)
    weights = Net(case)
    net = copy.deepcopy(weights).bfloat16() if case.half else weights
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.05, momentum=0.9)
    _, surgery = make_surgery(net, dataclasses.replace(case, options=options), lr=0.0)
    found: dict[str, Any] = {"reports": []}
    for step in range(STEPS):
        net.zero_grad()
        found["reports"].append(report_of(surgery.run([make_part(step, 0, 1)], loss_of(net, surgery))))
        for kept, used in zip(weights.parameters(), net.parameters(), strict=True):
            kept.grad = None if used.grad is None else used.grad.float()
        if step == 0:
            found["gradients"] = whole((name, p.grad) for name, p in weights.named_parameters())
        optimizer.step()
        with torch.no_grad():
            for kept, used in zip(weights.parameters(), net.parameters(), strict=True):
                used.copy_(kept)
    return found | {"weights": whole(weights.named_parameters())}


def whole(tensors: Any) -> dict[str, Tensor]:
    """Return whole tensors by name, without those that are None."""
    found = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors if x is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def compare(found: dict[str, Any], expected: dict[str, Any], case: Case) -> None:
    """Raise AssertionError if two results of `train` differ by more than rounding."""
    bound = 2**-7 if case.half else 1e-5
    for name in ("gradients", "weights"):
        assert found[name].keys() == expected[name].keys(), name
        mine, other = (torch.cat([x.flatten() for x in side[name].values()]) for side in (found, expected))
        assert (mine - other).norm() <= bound * other.norm(), (case.name, name)
    for mine, other in zip(found["reports"], expected["reports"], strict=True):
        for name, value in other.items():
            if value is None or isinstance(value, Tensor):
                assert (mine[name] is None) == (value is None), name
                if value is not None:
                    torch.testing.assert_close(mine[name], value, rtol=10 * bound, atol=10 * bound)
            else:
                assert mine[name] == pytest.approx(value, rel=10 * bound), name


def report_of(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ("losses", "cosines", "task_norms", "weights", "merged_norm")}


def message(attempt: Callable[[], object]) -> str:
    """Return the error of a user; "" if there is none."""
    try:
        attempt()
    except (UserError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def wrong_uses() -> Iterator[tuple[str, str]]:
    """Yield the errors of wrong uses by name."""
    case = next(case for case in CASES if case.name == "mixed")
    rows = make_part(0, dist.get_rank(), dist.get_world_size())

    def sharded() -> Net:
        net = Net(case)
        shard(net, case)
        return net

    def with_options(**options: Any) -> str:
        changed = dataclasses.replace(case, options=tuple(options.items()))
        return message(lambda: make_surgery(sharded(), changed))

    def step(change: Callable[[Net], object], loss: Callable[[Net, GradientSurgery], Any] = loss_of) -> str:
        net = sharded()
        change(net)
        _, surgery = make_surgery(net, case)
        return message(lambda: surgery.run([rows], loss(net, surgery)))

    yield "none", step(lambda net: None)
    yield "no model", with_options(model=None)
    yield "passes", with_options(passes="per_task")
    yield "kept", with_options(storage="kept")
    yield "max_norm", with_options(max_norm=1.0)

    net = sharded()
    optimizer = torch.optim.SGD(net.parameters())
    shared = [*net.trunk.parameters(), net.heads["same"].weight]
    yield "outside", message(lambda: GradientSurgery(optimizer, tasks=TASKS, model=net.trunk, shared=shared))
    net(*rows)  # the outermost module stays unsharded until backward
    yield "gathered", message(lambda: GradientSurgery(optimizer, tasks=TASKS, model=net.trunk))

    def part_alone(net: Net, surgery: GradientSurgery) -> Callable[[Any], Losses]:
        def loss_fn(rows: Any) -> Losses:
            with surgery.rows(rows[1]):
                net.trunk.first(torch.zeros(len(rows[1]), 7))
            raise AssertionError

        return loss_fn

    yield "part", step(lambda net: None, part_alone)

    def bypassing(net: Net, surgery: GradientSurgery) -> Callable[[Any], Losses]:
        def forward(ids: Tensor, tasks: Tensor) -> Losses:
            losses = dict(Net.forward(net, ids, tasks))
            loss, number = losses["kind"]
            return losses | {"kind": (loss + net.trunk.first.bias.square().sum(), number)}

        net.forward = forward  # type: ignore[method-assign]
        return loss_of(net, surgery)

    yield "bypassing", step(lambda net: None, bypassing)

    def declaring(net: Net, surgery: GradientSurgery) -> Callable[..., Losses]:
        return lambda rows, task_grads: net(*rows)

    yield "declares", step(lambda net: None, declaring)
    yield "factor", step(without_average)

    plain = Net(case)
    fully_shard(plain.trunk)
    yield "some", message(lambda: make_surgery(plain, case))
    alone = Net(case)
    fully_shard(alone, mesh=init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))["b"])
    yield "mesh", message(lambda: make_surgery(alone, case))

    halves = Net(case)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
    block = distribute_tensor(halves.trunk.first.weight.detach(), mesh, [Shard(0), Shard(1)])
    optimizer = torch.optim.SGD([nn.Parameter(block)])
    yield "tensor parallel", message(lambda: GradientSurgery(optimizer, tasks=TASKS, model=halves.trunk))
    yield "adamw", message(lambda: GradientSurgery(SurgeryAdamW(sharded().parameters()), tasks=TASKS))


def without_average(net: Net) -> None:
    module: Any
    for module in net.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum of products
            module.set_gradient_divide_factor(1.0)


def not_finite() -> Iterator[tuple[str, Any]]:
    """Yield what a loss on rank 1 does whose gradient of the trunk, or of a head, is not finite."""
    case = next(case for case in CASES if case.name == "mixed")
    for name in ("trunk", "head"):
        net = Net(case)
        shard(net, case)
        _, surgery = make_surgery(net, case)

        def loss_fn(rows: Any, net: Net = net, surgery: Any = surgery, name: str = name) -> Losses:
            losses = dict(loss_of(net, surgery)(rows))
            loss, number = losses["kind"]
            if dist.get_rank() != 1:
                return losses
            if name == "trunk":
                return losses | {"kind": (loss + (0 * loss).sqrt(), number)}
            bias = net.heads["kind"].bias
            return losses | {"kind": (loss + (0 * bias).sum().sqrt(), number)}

        rows = make_part(0, dist.get_rank(), dist.get_world_size())
        skipped: list[Any] = []
        found = message(lambda: skipped.append(surgery.run([rows], loss_fn).skipped))  # noqa: B023
        yield name, found or skipped[0]


def main(directory: Path, world: int) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FSDP")  # of views
        found: dict[str, Any] = {}
        for case in CASES + (HYBRID if world > 2 else []):
            parts = [rank * case.accumulation + a for a in range(case.accumulation)]
            found[case.name] = train(case, parts, world * case.accumulation)
        found["errors"] = dict(wrong_uses())
        found["not finite"] = dict(not_finite())
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()
    number = int((sys.argv[2:] or ["2"])[0])
    run_ranks(number, main, Path(sys.argv[1]), number, deepspeed=False)
