"""Blocks `with surgery.rows(...)`: several before a backward, checkpointing, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import architectures
import pytest
import torch
import torch.nn.functional as F
from one_pass import Net, OnePass, assert_same, assert_same_own, draw_rows, per_task
from random_nets import make_example
from torch import Tensor, nn
from trunk_examples import Example

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses

NUM_TASKS = 4
OPTIONS: list[dict[str, Any]] = [
    {"storage": "stacked"},
    {"storage": "kept"},
    {"storage": "replay"},
    {"scope": "tensor"},
]


class TwoViews(Net):
    """A net that calls its trunk twice, the second time with the rows in another order.

    rows: `surgery.rows`.
    """

    rows: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext

    def forward(self) -> Losses:
        flipped = {name: x.flip(0) for name, x in self.inputs.items()}
        with self.rows(self.task_of_row):
            first = self.features(self.trunk, self.inputs)
        with self.rows(self.task_of_row.flip(0)):
            second = self.features(self.trunk, flipped).flip(0)
        return self.losses_of(first * second.tanh())


def make(kind: str, net: type[Net] = Net, *, repeats: bool = False, dropout: float = 0.2) -> Net:
    example = architectures.build(kind, 3, dropout=dropout)
    made = net(example, draw_rows(3, example.rows, NUM_TASKS, ordered=False), NUM_TASKS).train()
    if repeats:
        made.trunk.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def check(net: Net, options: dict[str, Any]) -> None:
    expected, expected_own = per_task(net)
    one_pass = OnePass(net, **options)
    if isinstance(net, TwoViews):
        net.rows = one_pass.surgery.rows
    found, own = one_pass.gradients(None if isinstance(net, TwoViews) else net.task_of_row)
    assert_same(found, expected, 1e-5)
    assert_same_own(own, expected_own, 1e-5)


@pytest.mark.parametrize(
    ("kind", "options"), [*(("bert", options) for options in OPTIONS), ("llama", OPTIONS[2])], ids=str
)
def test_blocks_before_a_backward_add_up(kind: str, options: dict[str, Any]) -> None:
    check(make(kind, TwoViews), options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("bert", options) for options in OPTIONS),
        ("llama", OPTIONS[1]),
        *((kind, options) for kind in ("t5", "deberta_v2") for options in (OPTIONS[0], OPTIONS[3])),
    ],
    ids=str,
)
def test_checkpointing_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    """Layers run again in backward, with the same dropout; some inside modules of one task."""
    draws = architectures.build(kind, 3).draws
    check(make(kind, repeats=True, dropout=0.0 if draws else 0.2), options)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)
def test_checkpointing_in_several_blocks(options: dict[str, Any]) -> None:
    check(make("bert", TwoViews, repeats=True), options)


@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
def test_micro_batches_add_up(storage: str) -> None:
    """Micro-batches of one to four rows, of which some have rows of one task only."""
    net = make("bert", dropout=0.0)
    rows, weights = net.task_of_row, torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradients, own = per_task(net)
    one_pass = OnePass(net, storage=storage)
    one_pass.weights.copy_(weights)
    pieces = [part for part in torch.arange(len(rows)).split([1, 4, len(rows) - 5])]

    def loss_fn(piece: Tensor) -> Losses:
        with one_pass.surgery.rows(rows[piece]):
            features = net.features(net.trunk, {name: x[piece] for name, x in net.inputs.items()})
        return net.losses_of(features, rows[piece], net.labels[piece])

    counts = {name: int((rows == t).sum()) for t, name in enumerate(net.tasks)}
    net.zero_grad()
    one_pass.surgery.run(pieces, loss_fn, counts)
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    expected = {name: sum(w * task[name] for w, task in zip(weights, gradients, strict=True)) for name in gradients[0]}
    assert_same([found], [expected], 1e-5)
    assert_same_own(found, own, 1e-5)


class Around(nn.Module):
    """One module, called by a function."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self._call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.inner, x)


@pytest.mark.parametrize("kind", ["attention", "repeating", "gate"])
@pytest.mark.parametrize("repeats", [True, False])
def test_checkpointing_around_and_inside_modules_of_one_task(kind: str, repeats: bool) -> None:
    """A backward is inside such a module when it begins to repeat what is around the module."""
    for options in (OPTIONS[0], OPTIONS[3]):
        example = make_example(["linear", kind, "linear"], [False] * 3, [False] * 3, 7, 5, words=False, repeats=repeats)
        check(Net(example, torch.tensor([2, 0, 1, -1, 0, 0, 3]), NUM_TASKS), options)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str]] = {
    "LSTM": (
        lambda: nn.LSTM(6, 6, batch_first=True),
        lambda inner, x: inner(x)[0],
        r"inner \(LSTM\) has states with the rows in the second dimension.*, or use passes=.per_task.$",
    ),
    "batch_first": (
        lambda: nn.MultiheadAttention(6, 2),
        lambda inner, x: inner(x, x, x)[0],
        r"inner \(MultiheadAttention\) has batch_first=False",
    ),
    "rows in the second dimension": (
        lambda: nn.Linear(6, 6),
        lambda inner, x: inner(x.transpose(0, 1)).transpose(0, 1),
        r"inner \(Linear\) has an argument of shape \(4, 9, 6\), whose first dimension is neither the 9 rows",
    ),
    "one packed row": (lambda: nn.Linear(6, 6), lambda inner, x: inner(x), "one packed row for 9 rows"),
    "another module's weight": (
        lambda: nn.Linear(6, 6),
        lambda inner, x: F.linear(inner(x), inner.weight),
        r"inner\.weight is used by an op that does not write into task_grads",
    ),
    "weights out of reach": (
        lambda: nn.Linear(6, 6),
        lambda inner, x: F.linear(x, inner.weight),
        r"inner\.weight is used by an op that does not write into task_grads",
    ),
}


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_task_is_refused(reason: str, options: dict[str, Any]) -> None:
    make_inner, call, message = REFUSED[reason]
    x = torch.randn(9, 4, 6) if reason != "one packed row" else torch.randn(1, 36, 6)

    def features(trunk: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return trunk(inputs["x"]).view(9, 4, 6).sum(1)

    example = Example(Around(make_inner(), call), {"x": x}, features, 6)
    net = Net(example, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]), 3)
    with pytest.raises(UserError, match=message):
        OnePass(net, **options).step([1.0, 1.0, 1.0], net.task_of_row)


def test_a_loss_with_derivatives_of_the_model_is_refused() -> None:
    model = nn.Linear(3, 1)
    surgery = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", tasks=["a", "b"], model=model)
    x = torch.randn(4, 3, requires_grad=True)
    with surgery.rows({"a": 2, "b": 2}):
        y = model(x).square()
        with pytest.raises(UserError, match=r'no second derivatives.*use passes="per_task"'):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_pass_per_task_leaves_the_model_unchanged() -> None:
    net = make("t5", dropout=0.0)
    gradients, _ = per_task(net)
    target = torch.optim.SGD(net.parameters(), lr=0.1)
    surgery = GradientSurgery(target, "sum", tasks=net.tasks, model=net.trunk, passes="per_task")
    assert not any("forward" in vars(module) for module in net.trunk.modules())
    with surgery.rows(net.task_of_row):
        losses = net()
    surgery.backward(losses)
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert_same([found], [{name: sum(task[name] for task in gradients) for name in gradients[0]}], 1e-5)


def test_a_block_for_each_task_updates_statistics_once() -> None:
    """The runs for tasks without rows in a block leave no trace in BatchNorm's buffers."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten())
    plain, x = copy.deepcopy(trunk), torch.randn(5, 2, 4)
    surgery = GradientSurgery(torch.optim.SGD(trunk.parameters(), lr=0.1), tasks=["a", "b", "c"], model=trunk)
    losses = {}
    for task, rows in (("a", x[:2]), ("b", x[2:])):
        with surgery.rows({task: len(rows)}):
            losses[task] = trunk(rows).square().sum(), len(rows)
        plain(rows)
    surgery.backward(losses)
    for found, expected in zip(trunk.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
