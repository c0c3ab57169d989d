"""Operator calls that attached modules add to a forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_nets import Scale
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl.bench.waits import host_waits
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses

ROWS, LENGTH, WIDTH = 20, 3, 6
TASKS = (3, 16)
FEW, MANY = 1, 3  # modules; the difference is free of the step's own calls


class Chain(nn.Module):
    """Modules of one kind, one after the other; embeddings side by side."""

    def __init__(self, make: Callable[[], nn.Module], number: int) -> None:
        super().__init__()
        self.links = nn.ModuleList(make() for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.links[0], nn.Embedding):
            return torch.stack([link(x) for link in self.links]).sum(0)
        for link in self.links:
            x = link(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Calls(TorchDispatchMode):
    """Counter of operator calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func._schema.name] += 1
        return func(*args, **kwargs or {})


RULED: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "Embedding": lambda: nn.Embedding(9, WIDTH),
}


def batch(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "Embedding":
        return torch.randint(0, 9, (ROWS, LENGTH), generator=generator)
    return torch.randn(ROWS, LENGTH, WIDTH, generator=generator)


def losses_of(features: Tensor, rows: Tensor, tasks: list[str]) -> Losses:
    return {name: (features[rows == t].square().sum(), int((rows == t).sum())) for t, name in enumerate(tasks)}


def plain_calls(make: Callable[[], nn.Module], number: int, kind: str) -> Counter[str]:
    """Count the calls of a joint forward and backward."""
    chain, x = Chain(make, number), batch(kind)
    with Calls() as calls:
        loss = chain(x).square().sum()
        torch.autograd.grad(loss, list(chain.parameters()))
    return calls.of


def attached_calls(
    make: Callable[[], nn.Module], number: int, kind: str, rows: Tensor, num_tasks: int, storage: Any
) -> Counter[str]:
    """Count the calls of a forward and backward of the second step, without its merging."""
    chain, x = Chain(make, number), batch(kind)
    tasks = [f"task{t}" for t in range(num_tasks)]
    surgery = GradientSurgery(
        torch.optim.SGD(chain.parameters(), lr=0.1), tasks=tasks, model=chain, storage=storage, verify_every=0
    )
    counts = {name: ROWS for name in tasks}

    def micro_batch(last: bool) -> None:
        with surgery.rows(rows):
            losses = losses_of(chain(x), rows, tasks)
        surgery.backward(losses, counts, last=last)

    micro_batch(last=True)
    with Calls() as calls:
        micro_batch(last=False)
    micro_batch(last=True)
    return calls.of


def per_module(calls: Callable[..., Counter[str]], make: Callable[[], nn.Module], *args: Any) -> Counter[str]:
    """Return the calls of one module. calls: counts those of a chain."""
    few, many = calls(make, FEW, *args), calls(make, MANY, *args)
    more = Counter({name: many[name] - few[name] for name in many | few})
    assert all(number % (MANY - FEW) == 0 for number in more.values()), more
    return Counter({name: number // (MANY - FEW) for name, number in more.items()})


def rows_of(num_tasks: int, *, ordered: bool) -> Tensor:
    rows = torch.arange(ROWS) % num_tasks
    return rows.sort().values if ordered else rows


@pytest.mark.parametrize("storage", ["stacked", "kept"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", RULED)
def test_a_rule_adds_few_calls(kind: str, ordered: bool, storage: str) -> None:
    plain = per_module(plain_calls, RULED[kind], kind)
    for num_tasks in TASKS:
        rows = rows_of(num_tasks, ordered=ordered)
        found = per_module(attached_calls, RULED[kind], kind, rows, num_tasks, storage)
        assert found.total() - plain.total() <= 10 + 10 * num_tasks, found - plain
        if ordered:  # rows in order are not copied
            assert not {"aten::index_select", "aten::index", "aten::gather"} & (found - plain).keys()


@pytest.mark.parametrize("ordered", [True, False])
def test_the_general_rule_adds_few_calls(ordered: bool) -> None:
    plain = per_module(plain_calls, Scale, "Scale")
    for num_tasks in TASKS:
        rows = rows_of(num_tasks, ordered=ordered)
        found = per_module(attached_calls, Scale, "Scale", rows, num_tasks, "stacked")
        assert found.total() <= num_tasks * (plain.total() + 12), found - plain


@pytest.mark.parametrize("given", ["counts", "names", "tensor"])
def test_rows_on_the_host_cause_no_wait(given: str) -> None:
    """A step waits for the device once, to read its result."""
    chain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Chain(Scale, 1))
    tasks, x = ["a", "b"], batch("Linear")
    surgery = GradientSurgery(torch.optim.SGD(chain.parameters(), lr=0.1), tasks=tasks, model=chain, verify_every=0)

    def step() -> None:
        tensor = torch.tensor([0] * 12 + [1] * 8)  # on the host, as a data loader makes it
        forms = {"counts": {"a": 12, "b": 8}, "names": ["a"] * 12 + ["b"] * 8, "tensor": tensor}
        with surgery.rows(forms[given]):
            first, second = chain(x).square().flatten(1).sum(1).split([12, 8])
        surgery.backward({"a": (first.sum(), 12), "b": (second.sum(), 8)})

    step()
    waits = host_waits(step)
    assert len(waits) == 1 and "solver.py" in waits[0], waits
