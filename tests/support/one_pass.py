"""Task gradients of a net by T backward passes, and by one pass of an attached trunk.

Shapes: B rows, T tasks. A row's task is a number from 0 to T - 1, or -1 for a row of no task.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import architectures
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trunk_examples import Example, Features

from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.methods.table import METHODS
from fastmtl.surgery.sinks.stack import StackSink

LABELS = 3
Gradients = list[dict[str, Tensor]]  # one per task: parameter -> gradient


class Net(nn.Module):
    """A trunk with one Linear head per task, and the losses of its batch.

    rows: int64 [B], each row's task.
    """

    def __init__(self, example: Example, rows: Tensor, num_tasks: int) -> None:
        super().__init__()
        self.trunk = example.trunk
        dtype = next(self.trunk.parameters()).dtype
        self.heads = nn.ModuleList(nn.Linear(example.width, LABELS, dtype=dtype) for _ in range(num_tasks))
        self.inputs, self.task_of_row = example.inputs, rows
        self.features: Features = example.features
        self.labels = torch.arange(example.rows) % LABELS
        self.tasks = [f"task{t}" for t in range(num_tasks)]

    def forward(self) -> Losses:
        """Return the losses of the batch, as `losses_of` does."""
        return self.losses_of(self.features(self.trunk, self.inputs))

    def losses_of(self, features: Tensor, rows: Tensor | None = None, labels: Tensor | None = None) -> Losses:
        """Return the losses of the tasks that have rows, and a zero with 0 rows of every second
        other one.

        rows, labels: [B] for the features of other rows than the net's.
        """
        rows = self.task_of_row if rows is None else rows
        labels = self.labels if labels is None else labels
        losses = {}
        for t, (name, head) in enumerate(zip(self.tasks, self.heads, strict=True)):
            chosen = rows == t
            if chosen.any() or t % 2:
                loss = F.cross_entropy(head(features[chosen]), labels[chosen], reduction="sum")
                losses[name] = loss, int(chosen.sum())
        return losses


class Fixed:
    """A method with given weights [T], which it reads again in every step.

    seen: every Gramian that the method has received.
    """

    by_rank = by_tensor = True

    def __init__(self, *, weights: Tensor, seen: list[Tensor]) -> None:
        self._weights, self._seen = weights, seen

    def weights(self, gramian: Tensor, order: Tensor) -> Tensor:
        self._seen.append(gramian.clone())
        return self._weights.clone()

    def of_tensor(self, index: int) -> Fixed:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@contextmanager
def fixed_weights() -> Iterator[None]:
    """Make the method "fixed" known to GradientSurgery inside the block."""
    with mock.patch.dict(METHODS, fixed=Fixed):
        yield


def draw_rows(seed: int, rows: int, num_tasks: int, *, ordered: bool) -> Tensor:
    """Return each row's task [B].

    One task has no rows. In order, each other task has rows side by side; else some rows belong to
    no task, at any place.
    """
    random = np.random.default_rng(seed)
    absent = int(random.integers(num_tasks))
    present = [t for t in range(num_tasks) if t != absent]
    kinds = present if ordered else [*present, -1]
    # Every kind once, and the rest at random.
    found = np.concatenate([kinds, random.choice(kinds, rows - len(kinds))])
    return torch.from_numpy(np.sort(found) if ordered else random.permutation(found))


def make_net(name: str, seed: int, num_tasks: int = 4, *, double: bool = False, ordered: bool = False) -> Net:
    """Return the architecture with heads, in training mode: dropout is on where the masks of one
    pass are those of T passes.
    """
    example = architectures.build(name, seed)
    if double:
        example = example.double()
    net = Net(example, draw_rows(seed, example.rows, num_tasks, ordered=ordered), num_tasks)
    return net.eval() if example.draws else net.train()


def per_task(net: Net, seed: int = 0) -> tuple[Gradients, dict[str, Tensor]]:
    """Return each task's gradient of the trunk's trained parameters, by T passes of a copy of the
    net, and the gradients of the heads.

    seed: of the random numbers in forward.
    """
    net = copy.deepcopy(net)
    torch.manual_seed(seed)
    losses = net()
    names, parameters = zip(*((n, p) for n, p in net.named_parameters() if p.requires_grad), strict=True)
    gradients: Gradients = []
    own: dict[str, Tensor] = {}
    for task in net.tasks:
        loss, rows = losses.get(task, (next(net.heads.parameters()).sum() * 0.0, 0))
        found = torch.autograd.grad(
            loss / max(rows, 1), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        by_name = dict(zip(names, found, strict=True))
        gradients.append({name: by_name[name] for name in names if name.startswith("trunk.")})
        for name in names:
            if name.startswith("heads."):
                own[name] = own.get(name, 0) + by_name[name]
    return gradients, own


class OnePass:
    """Surgery on a net's attached trunk, whose steps merge with given weights."""

    def __init__(self, net: Net, **options: Any) -> None:
        self.net = net
        self.weights, self.seen = torch.zeros(len(net.tasks)), list[Tensor]()
        target = torch.optim.SGD(net.parameters(), lr=0.1)
        with fixed_weights():
            self.surgery = GradientSurgery(
                target,
                "fixed",
                tasks=net.tasks,
                model=net.trunk,
                options={"weights": self.weights, "seen": self.seen},
                **options,
            )

    def step(self, weights: Sequence[float], rows: Any, seed: int = 0) -> dict[str, Tensor]:
        """Run a step by `run` and return the merged gradients.

        rows: what `surgery.rows` gets; None if the net itself calls it.
        """
        self.weights.copy_(torch.tensor(weights))
        self.net.zero_grad()

        def loss_fn(batch: None) -> Losses:
            with nullcontext() if rows is None else self.surgery.rows(rows):
                return self.net()

        torch.manual_seed(seed)
        self.seen.clear()
        info = self.surgery.run([None], loss_fn)
        assert info.skipped is None
        return merged_of(self.net)

    def gradients(self, rows: Any, seed: int = 0) -> tuple[Gradients, dict[str, Tensor]]:
        """Return each task's gradient of the trunk, and the gradients of the heads.

        These are merged gradients with the weight 1 for one task: of J if it is stored, else of T
        steps.
        """
        found: Gradients = []
        own: dict[str, Tensor] = {}
        sink = self.surgery._sink
        for weights in torch.eye(len(self.net.tasks)):
            if isinstance(sink, StackSink) and found:
                by_id = sink.combine(weights)
                merged = {name: by_id[id(p)] for name, p in self.net.named_parameters() if id(p) in by_id}
            else:
                merged = self.step(weights.tolist(), rows, seed)
                own = {name: g for name, g in merged.items() if name.startswith("heads.")}
            found.append({name: g for name, g in merged.items() if name.startswith("trunk.")})
        return found, own

    def gramian(self) -> Tensor:
        """Return G of the last step; with `scope: tensor`, the sum of all parameters'."""
        return torch.stack(self.seen).sum(0)


def merged_of(net: Net) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(found: Gradients, expected: Gradients, bound: float) -> float:
    """Compare task by task, and return the largest error of a parameter.

    A task's error is measured by the norm of its whole gradient.
    """
    largest = 0.0
    for t, (task, wanted) in enumerate(zip(found, expected, strict=True)):
        norm = whole_norm(wanted)
        for name, gradient in wanted.items():
            error = (task.get(name, torch.zeros(())) - gradient).double().norm()
            assert error <= bound * norm, f"task {t}: {name} differs by {error / norm:.1e} of the whole gradient"
            largest = max(largest, float(error / norm) if norm else 0.0)
    return largest


def assert_same_own(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    norm = whole_norm(expected)
    for name, gradient in expected.items():
        assert (found.get(name, torch.zeros(())) - gradient).norm() <= bound * norm, name


def whole_norm(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([part.double().norm() for part in gradient.values()]).norm()


def assert_gramian(found: Tensor, expected: Gradients, bound: float) -> None:
    whole = torch.stack([torch.cat([g.flatten().double() for g in task.values()]) for task in expected])
    gram = whole @ whole.T
    assert (found - gram).abs().max() <= bound * gram.abs().max()


def as_counts(rows: Tensor, tasks: Sequence[str]) -> dict[str, int]:
    """Return rows in order as {task: number}."""
    return {name: int((rows == t).sum()) for t, name in enumerate(tasks)}


def as_names(rows: Tensor, tasks: Sequence[str]) -> list[str]:
    """Return the name of each row's task."""
    return [tasks[t] for t in rows.tolist()]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to compute task gradients in one pass, and the net and rows for it.

    given: what `surgery.rows` gets. options: of GradientSurgery.
    """

    double: bool
    ordered: bool
    given: Callable[[Tensor, Sequence[str]], Any]
    options: dict[str, Any]

    def check(self, name: str, seed: int) -> float:
        """Compare one pass of an architecture with T passes; return the largest error of a task's
        gradient, measured by its norm.
        """
        net = make_net(name, seed, double=self.double, ordered=self.ordered)
        expected, expected_own = per_task(net)
        one_pass = OnePass(net, **self.options)
        found, own = one_pass.gradients(self.given(net.task_of_row, net.tasks))
        # J is float32 in all cases, and its own rounding is 6e-8.
        bound = 1e-6 if self.double else 1e-5
        largest = assert_same(found, expected, bound)
        assert_same_own(own, expected_own, bound)
        assert_gramian(one_pass.gramian(), expected, 1e-5)
        return largest


def as_tensor(rows: Tensor, tasks: Sequence[str]) -> Tensor:
    return rows


UNCHECKED = {"verify_every": 0}
WAYS = {
    "stacked": Way(True, False, as_tensor, {"storage": "stacked", **UNCHECKED}),
    "stacked-float32": Way(False, True, as_counts, {"storage": "stacked"}),  # compared by surgery too
    "kept": Way(True, True, as_names, {"storage": "kept", **UNCHECKED}),
    "kept-float32": Way(False, False, as_tensor, {"storage": "kept"}),
    "replay": Way(True, False, as_tensor, {"storage": "replay", **UNCHECKED}),
    "replay-float32": Way(False, True, as_tensor, {"storage": "replay"}),
    "tensor": Way(True, False, as_tensor, {"scope": "tensor", **UNCHECKED}),
    "tensor-float32": Way(False, True, as_counts, {"scope": "tensor"}),
}
