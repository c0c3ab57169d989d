"""Rows of several tasks: one forward and a backward per set of tasks without common rows.

Steps on two ranks are in test_deepspeed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
import torch.nn.functional as F
from one_pass import Net, OnePass, assert_gramian, assert_same, assert_same_own, per_task
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.attach.several import passes_of
from fastmtl.surgery.losses import Losses

TASKS = 4
# The tasks of the first rows; all further rows have the last of these sets.
MIXED: list[tuple[int, ...]] = [(0, 1, 2), (3,), (), (1, 2), (2,), (0, 3), (3,)]
EQUAL: list[tuple[int, ...]] = [(0, 1, 2)]
STORAGES = ["stacked", "kept", "replay"]


class Several(Net):
    """A net with a table of the tasks of each row, bool [B, T]."""

    def losses_of(self, features: Tensor, rows: Tensor | None = None, labels: Tensor | None = None) -> Losses:
        rows = self.task_of_row if rows is None else rows
        labels = self.labels if labels is None else labels
        losses = {}
        for t, (name, head) in enumerate(zip(self.tasks, self.heads, strict=True)):
            chosen = rows[:, t]
            losses[name] = F.cross_entropy(head(features[chosen]), labels[chosen], reduction="sum"), int(chosen.sum())
        return losses


def make(kind: str, sets: list[tuple[int, ...]] = MIXED, *, repeats: bool = False) -> Several:
    example = architectures.build(kind, 3)
    rows = [*sets, *[sets[-1]] * example.rows][: example.rows]
    net = Several(example, torch.tensor([[t in row for t in range(TASKS)] for row in rows]), TASKS)
    if repeats:
        net.trunk.gradient_checkpointing_enable({"use_reentrant": False})
    return net.eval() if example.draws else net.train()


def as_tuples(table: Tensor) -> list[Any]:
    return [tuple(f"task{t}" for t in row.nonzero().flatten().tolist()) for row in table]


def as_counts(table: Tensor) -> dict[Any, int]:
    """Return rows in order as {tuple of tasks: number}, the last one for all further rows."""
    rows = as_tuples(table)
    kinds = dict.fromkeys(rows)
    return {kind: rows.count(kind) for kind in kinds}


def check(net: Net, given: Any, **options: Any) -> None:
    expected, expected_own = per_task(net)
    one_pass = OnePass(net, **options)
    found, own = one_pass.gradients(given)
    assert_same(found, expected, 1e-5)
    assert_same_own(own, expected_own, 1e-5)
    assert_gramian(one_pass.gramian(), expected, 1e-5)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["bert", "convnet", "t5"])
def test_mixed_rows_equal_a_pass_per_task(kind: str, storage: str) -> None:
    """Surgery compares the first step with T passes, too."""
    net = make(kind)
    check(net, as_tuples(net.task_of_row), storage=storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_all_losses_of_all_rows(storage: str) -> None:
    net = make("bert", EQUAL)
    check(net, as_counts(net.task_of_row), storage=storage)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_checkpointing_repeats_forwards_in_every_pass(kind: str) -> None:
    net = make(kind, repeats=True)
    check(net, net.task_of_row)


def test_a_backward_has_no_pass_for_disjoint_tasks() -> None:
    """Four tasks, of which three have common rows; one forward, and J has no temporary copy."""
    net = make("bert")
    surgery = GradientSurgery(torch.optim.SGD(net.parameters(), lr=0.1), tasks=net.tasks, model=net.trunk)
    passes, last = [], []

    def count(*_: object) -> None:
        passes.append(1)

    for _ in range(2):
        passes.clear()
        with surgery.rows(net.task_of_row):
            features = net.features(net.trunk, net.inputs)
        features.register_hook(count)
        surgery.backward(net.losses_of(features))
        last.append(len(passes))
    assert last == [3 + TASKS, 3]  # the first step is compared with T passes
    assert passes_of([(0, 1, 2), (0, 3), (2,)], TASKS) == [[0], [1, 3], [2]]
    assert passes_of([(0,), (2,)], TASKS) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_loss_of_other_rows_is_found(storage: str) -> None:
    net = make("bert")
    given = net.task_of_row.clone()
    given[5] = given[0]  # row 5 is one of task 3
    with pytest.raises(
        UserError, match="one pass gives other task gradients than a pass per task .* tasks task0, task3"
    ):
        OnePass(net, storage=storage).step([1.0] * TASKS, given)


REFUSED: dict[str, tuple[Callable[[Several], Any], dict[str, Any], str]] = {
    "scope": (lambda net: net.task_of_row, {"scope": "tensor"}, "use scope='global', or backward"),
    "table": (lambda net: net.task_of_row[:, :2], {}, r"a tensor of shape \(\d+, 2\) for 4 tasks"),
    "unknown": (lambda net: [("task0", "other")] * 9, {}, "other"),
    "list": (lambda net: [["task0"]] * 9, {}, "is no task: give the task of each row"),
    "rows": (lambda net: [("task0", "task1")] * len(net.labels), {}, "task task2 has losses of .* no row of the batch"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_rows_that_are_refused(reason: str) -> None:
    given, options, message = REFUSED[reason]
    net = make("convnet")
    with pytest.raises(UserError, match=message):
        OnePass(net, **options).step([1.0] * TASKS, given(net))
