"""The ranks of tests/surgery/test_group.py: every case in one launch.

Usage: group_cases.py DIRECTORY
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mixed_rows
import ranked_groups
import torch
import torch.distributed as dist
from op_recorder import OpRecorder
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.errors import TrainingError, UserError
from fastmtl.surgery import GradientSurgery, SurgeryAdamW, diagnose, functional
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.ranks import collectives
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.targets import group
from fastmtl.surgery.targets.ddp import without_reduction

STEPS, WORLD = 2, 2
COUNTS = {"kind": 9, "same": 3, "degree": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to train `Net`. passes: "one" with `task_grads`, "per_task", or "model" with unsorted
    rows. absent: the losses of tasks without rows are left out. ddp: "inside" `without_reduction`
    or "outside", with or without an option of DistributedDataParallel. options: of GradientSurgery.
    """

    name: str
    method: str = "pcgrad"
    options: tuple[tuple[str, Any], ...] = ()
    passes: str = "one"
    accumulation: int = 1
    absent: bool = False
    adamw: bool = False
    dtype: torch.dtype = torch.float32
    ddp: str = ""
    bucket: int = group.BUCKET
    recorded: bool = False

    @property
    def measures(self) -> bool:
        """True if `diagnose` supports the case."""
        options = dict(self.options)
        return self.method != "sum" and not self.recorded and not options.keys() & {"scope", "sketch_size"}


def _case(name: str, method: str = "pcgrad", **more: Any) -> Case:
    fields = {field.name for field in dataclasses.fields(Case)}
    options = tuple((key, more.pop(key)) for key in list(more) if key not in fields)
    return Case(name, method, options, **more)


CASES = [
    _case("stacked", accumulation=2, bucket=40),
    _case("kept", storage="kept", absent=True, max_norm=0.5),
    _case("replay", storage="replay"),
    _case("replay-accumulated", storage="replay", accumulation=2, bucket=40),
    _case("tensor", "gradvac", scope="tensor"),
    _case("sketch", reduce="sketch", sketch_size=64),
    _case("local", reduce="local", absent=True),
    _case("recorded", recorded=True),
    _case("clipped", max_norm=0.5, absent=True),
    _case("adamw", adamw=True),
    _case("bfloat16", dtype=torch.bfloat16, accumulation=2),
    _case("passes", passes="per_task", bucket=40),
    _case("passes-absent", passes="per_task", absent=True, accumulation=2),
    _case("sum", "sum", accumulation=2, bucket=40),
    _case("sum-absent", "sum", absent=True),
    _case("sum-clipped", "sum", max_norm=0.5, accumulation=2, absent=True),
    _case("sum-measured", "sum", max_norm=float("inf")),
    _case("sum-bfloat16", "sum", dtype=torch.bfloat16, accumulation=2),
    _case("model", passes="model", accumulation=2),
    _case("model-replay", passes="model", storage="replay"),
    _case("ddp-model", ddp="inside", passes="model"),
    _case("ddp-model-tensor", ddp="inside", passes="model", scope="tensor", absent=True),
    _case("ddp", ddp="inside"),
    _case("ddp-static", ddp="inside static_graph"),
    _case("ddp-passes", ddp="inside", passes="per_task", accumulation=2),
    _case("ddp-outside", ddp="outside find_unused_parameters"),
    _case("ddp-outside-passes", ddp="outside", passes="per_task", accumulation=2),
    _case("ddp-outside-static", "sum", ddp="outside static_graph"),
]


class Trunk(nn.Module):
    """Shared layers: an embedding, a Linear, a LayerNorm, and a pooler that no task uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.words: Any = nn.Embedding(11, 6, dtype=dtype)
        self.dense: Any = nn.Linear(6, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.pooler = nn.Linear(6, 6, dtype=dtype)

    def forward(self, ids: Tensor, segments: Segments | None = None, sink: Sink | None = None) -> Tensor:
        if segments is None:
            return self.norm(self.dense(self.words(ids)).tanh())
        x = functional.embedding(ids, self.words.weight, segments, sink)
        x = functional.linear(x, self.dense.weight, self.dense.bias, segments, sink).tanh()
        return functional.layer_norm(x, self.norm.weight, self.norm.bias, 1e-5, segments, sink)


class Net(nn.Module):
    """A trunk and a head per task. `forward` is for rows of all tasks by task."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = Trunk(dtype)
        self.heads = nn.ModuleDict({name: nn.Linear(6, 2, dtype=dtype) for name in COUNTS})

    def forward(self, rows: dict[str, Tensor], sink: Sink | None = None, absent: bool = False) -> Losses:
        offsets = torch.tensor([0, *map(len, rows.values())]).cumsum(0)
        segments = Segments(offsets.int(), tuple(offsets.tolist()))
        return self.losses(self.trunk(torch.cat(list(rows.values())), segments, sink), rows, absent)

    def losses(self, hidden: Tensor, rows: dict[str, Tensor], absent: bool) -> Losses:
        """Return the losses of the trunk's output [N, 6], in the order of the tasks."""
        losses = {}
        for (name, ids), part in zip(rows.items(), hidden.split([len(ids) for ids in rows.values()]), strict=True):
            wanted = (ids % 3).unsqueeze(1)
            losses[name] = (self.heads[name](part).float() - wanted).square().sum(), len(ids)
        return {name: entry for name, entry in losses.items() if entry[1] or not absent}


def make_part(step: int, part: int, parts: int) -> dict[str, Tensor]:
    """Return one of `parts` pieces of a step's rows. The second task has rows in one piece only."""
    draw = torch.Generator().manual_seed(step)
    found = {}
    for name, count in COUNTS.items():
        ids = torch.randint(0, 11, (count,), generator=draw)
        found[name] = (ids if part == 0 else ids[:0]) if name == "same" else ids[part::parts]
    return found


def make_surgery(net: Net, case: Case, number: int = 1, trunk: nn.Module | None = None) -> tuple[Any, ...]:
    """Return an optimizer and `number` surgeries on it. trunk: their argument `model`."""
    if case.adamw:
        optimizer: torch.optim.Optimizer = SurgeryAdamW(net.parameters(), lr=0.05, max_norm=1.0)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    arguments = {
        "tasks": list(COUNTS),
        "model": trunk,
        "shared": list(net.trunk.parameters()),
        "sparse": [] if case.method == "sum" else [net.trunk.words.weight],
        "task_weights": {"same": 0.5},
        "seed": 3,
        **dict(case.options),
    }
    surgeries = [GradientSurgery(optimizer, case.method, **arguments) for _ in range(number)]
    for surgery in surgeries if case.recorded else ():
        surgery.record_with(partial(record_merging, recorder=OpRecorder()))
    return optimizer, *surgeries


def train(case: Case, parts: list[int], of: int, *, by_rank: bool = False) -> dict[str, Any]:
    """Return weights, gradients, names of parameters without gradient, the reports, and the Gramian
    of each shared parameter in each step.

    by_rank: True for a surgery of its own for each part; their gradients add up in `.grad`.
    """
    net = Net(case.dtype)
    where, *flags = case.ddp.split() or [""]
    flags_on: dict[str, Any] = dict.fromkeys(flags, True)
    model: Any = net.trunk if case.passes == "model" else net
    if where and of > 1:
        model = DistributedDataParallel(model, **flags_on)
    context = nullcontext if where == "outside" else partial(without_reduction, model)
    trunk = model if case.passes == "model" else None
    optimizer, *surgeries = make_surgery(net, case, len(parts) if by_rank else 1, trunk)
    infos: list[SurgeryInfo] = []
    diagnosis = diagnose(surgeries[0], every=1, layer_of=str) if case.measures else None  # a layer per parameter
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [make_part(step, part, of) for part in parts]
        counts = COUNTS if case.accumulation > 1 or by_rank else None  # else the ranks count

        def with_sink(rows: dict[str, Tensor], task_grads: Sink) -> Losses:
            with context():
                return model(rows, task_grads, case.absent)

        def without_sink(rows: dict[str, Tensor]) -> Losses:
            with context():
                return model(rows, None, case.absent)

        def with_model(rows: dict[str, Tensor]) -> Losses:
            sizes = torch.tensor([len(ids) for ids in rows.values()])
            tasks = torch.arange(len(rows)).repeat_interleave(sizes)
            mixed = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(5))
            with surgeries[0].rows(tasks[mixed]):
                hidden = model(torch.cat(list(rows.values()))[mixed])
            return net.losses(hidden[mixed.argsort()], rows, case.absent)

        loss_fn = {"one": with_sink, "per_task": without_sink, "model": with_model}[case.passes]
        stop = step == 1 and 0 < of - 1 in parts
        for surgery, given in zip(surgeries, [[each] for each in batches] if by_rank else [batches], strict=True):
            infos.append(surgery.run(given, loss_fn, counts, stop=stop))
        assert infos[-1].skipped is None
        if step < STEPS - 1 or case.adamw:
            optimizer.step()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    return {
        "weights": {name: parameter.detach() for name, parameter in net.named_parameters()},
        "missing": missing,
        "gradients": gradients,
        "reports": [report_of(info) for info in infos],
        "layers": torch.zeros(0) if diagnosis is None else torch.from_numpy(diagnosis.gramians()[1]),
    }


def report_of(info: SurgeryInfo) -> dict[str, Any]:
    numbers = ("losses", "cosines", "task_norms", "weights", "merged_norm", "own_norm", "total_norm", "stop")
    return {name: getattr(info, name) for name in numbers}


def message(attempt: Callable[[], object]) -> str:
    """Return the error of a user; "" if there is none."""
    try:
        attempt()
    except (UserError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors(rank: int) -> Iterator[tuple[str, str]]:
    """Yield the errors of wrong uses by name."""
    case = CASES[0]

    def with_change(change: Callable[[Net], object]) -> str:
        net = Net()
        if rank == 1:
            with torch.no_grad():
                change(net)
        return message(lambda: make_surgery(net, case))

    yield "same", with_change(lambda net: None)
    yield "numbers", with_change(lambda net: net.trunk.dense.bias[2].add_(1e-6))
    yield "sign", with_change(lambda net: net.trunk.norm.bias[0].neg_())  # -0.0 is another number of bits
    yield "shape", with_change(lambda net: setattr(net.heads, "same", nn.Linear(6, 3)))
    yield "frozen", with_change(lambda net: net.trunk.norm.requires_grad_(False))
    yield "number", with_change(lambda net: setattr(net, "more", nn.Linear(6, 2)))

    sharded = Net()
    sharded.trunk.dense.bias._fsdp_flattened = True  # FSDP's own mark
    yield "sharded", message(lambda: make_surgery(sharded, case))
    alone = dist.new_group([rank], use_local_synchronization=True)
    yield "group", message(lambda: without_reduction(DistributedDataParallel(Net(), process_group=alone)))
    net = Net()
    assert isinstance(without_reduction(net), nullcontext)
    assert not isinstance(without_reduction(DistributedDataParallel(net)), nullcontext)
    net.register_buffer("places", torch.arange(3))
    assert isinstance(without_reduction(DistributedDataParallel(net)), nullcontext)


def skipped(rank: int) -> dict[str, Any]:
    """Return what a loss or gradient that is not finite on rank 1 does to both ranks."""
    found: dict[str, Any] = {}
    cases = {
        "pcgrad": _case(""),
        "sum-clipped": _case("", "sum", max_norm=1.0),
        "sum": _case("", "sum"),
        "tensor": _case("", scope="tensor"),
    }
    for name, case in cases.items():
        net = Net()
        _, surgery = make_surgery(net, case)

        def broken(rows: dict[str, Tensor], task_grads: Sink, net: Net = net, name: str = name) -> Losses:
            losses = dict(net(rows, task_grads))
            loss, count = losses["degree"]
            if rank == 1:  # the gradient of a root of 0 is not finite
                losses["degree"] = loss * float("inf") if name == "sum" else loss + (0 * loss).sqrt(), count
            return losses

        try:
            found[name] = surgery.run([make_part(0, rank, WORLD)], broken).skipped
        except TrainingError as error:
            found[name] = str(error)
        found[f"{name}-grad"] = [p.grad is None for p in net.parameters()]
    return found


def after_failure(rank: int) -> bool:
    """Return True if a step after a failed one, on the same surgery, equals a first step."""
    batches = [make_part(0, 2 * rank + part, 4) for part in (0, 1)]
    found = []
    for fails in (False, True):
        net = Net()
        _, surgery = make_surgery(net, _case("", "sum"))
        if fails:
            losses = iter([net(batches[0])])
            with suppress(StopIteration):  # the second micro-batch has no losses
                surgery.run(batches, lambda _, losses=losses: next(losses), COUNTS)
        surgery.run(batches, lambda rows, net=net: net(rows), COUNTS)
        found.append([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
    return all(map(torch.equal, *found))


def mixed(rank: int) -> dict[str, str]:
    """Return the errors of a model whose rows mix on rank 1 only."""
    return {
        "stacked": message(lambda: mixed_rows.train(1, mix="attention" if rank else "")),
        "replay": message(lambda: mixed_rows.train(1, mix="attention" if rank else "", storage="replay")),
        "outputs": message(lambda: mixed_rows.train(1, mix="trained batch norm", evaluates=rank == 0)),
    }


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    assert message(lambda: make_surgery(Net(), CASES[0])) == ""  # one process: no group yet
    early = make_surgery(net := Net(), CASES[0])[1]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {"late": message(lambda: early.backward(net(make_part(0, rank, WORLD))))}
    found |= {name: text for name, text in errors(rank)}
    for case in CASES:
        parts = [rank * case.accumulation + a for a in range(case.accumulation)]
        with mock.patch.object(group, "BUCKET", case.bucket), mock.patch.object(collectives, "BUCKET", case.bucket):
            found[case.name] = train(case, parts, WORLD * case.accumulation)
    found["skipped"] = skipped(rank)
    found["after failure"] = after_failure(rank)
    found["mixed"] = mixed(rank)
    found["ranked"] = ranked_groups.gradients(ranked_groups.SHARES[rank])
    found["ranked, one rank"] = ranked_groups.gradients([] if rank == 0 else range(len(ranked_groups.COUNTS)))
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()
    run_ranks(WORLD, main, Path(sys.argv[1]), deepspeed=False)
