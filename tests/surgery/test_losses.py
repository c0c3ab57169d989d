"""Results of loss functions, and models that surgery does not support: a message for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl.errors import UserError
from fastmtl.surgery import FlatParameters, GradientSurgery, SurgeryAdamW


class Net(nn.Module):
    """Two tasks on a table and a layer of three dimensions, with a norm that has no weight."""

    def __init__(self, *, sparse: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4, sparse=sparse)
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.dense = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        self.reentrant = reentrant

    def shared(self) -> list[nn.Parameter]:
        return [*self.words.parameters(), *self.dense.parameters()]

    def encode(self, x: Tensor) -> Tensor:
        return self.dense(self.norm(x)).tanh()

    def forward(self, ids: Tensor) -> dict[str, tuple[Tensor, int]]:
        x = self.words(ids)
        x = self.encode(x) if self.reentrant is None else checkpoint(self.encode, x, use_reentrant=self.reentrant)
        outputs = [head(x[:, 0]).squeeze(1) for head in self.heads]
        return {"a": (outputs[0].square().sum(), 3), "b": ((outputs[1] - 1).square().sum(), 3)}


IDS = torch.tensor([[1, 2], [3, 1], [5, 6]])


def surgery_on(net: Net, method: str = "pcgrad", **more: Any) -> GradientSurgery:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return GradientSurgery(optimizer, method, **{"tasks": ["a", "b"], "shared": net.shared(), **more})


TENSOR = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, r"the losses are of type NoneType: give \{task: \(sum"),
        ([TENSOR], "the losses are of type list"),
        ({}, "no loss was given"),
        ({"c": (TENSOR, 1)}, "losses of c were given, tasks are a, b"),
        ({3: (TENSOR, 1)}, "losses of 3 were given"),
        ({"a": TENSOR}, "the loss of task a is of type Tensor, not a pair: give"),
        ({"a": (TENSOR,)}, "the loss of task a is of type tuple, not a pair"),
        ({"a": (0.0, 0)}, "the loss of task a is 0.0, not a tensor: leave a task without rows out"),
        (
            {"a": (TENSOR[None], 1)},
            r"the loss of task a has shape \(1,\): give one number, the sum of the rows' losses",
        ),
        ({"a": (torch.ones(3, requires_grad=True), 3)}, r"shape \(3,\): give one number"),
        ({"a": (torch.ones(()), 3)}, "the loss of task a has 3 rows, but depends on no parameter that is trained"),
        ({"a": (torch.zeros(()), 0)}, "no task has rows, and no loss depends on a parameter"),
        ({"a": (TENSOR, -1)}, "the loss of task a: its number of rows is -1: give 0 or more"),
        ({"a": (TENSOR, 1.5)}, "its number of rows is 1.5: give an integer"),
        ({"a": (TENSOR, "3")}, "its number of rows is '3': give an integer"),
    ],
)
@pytest.mark.parametrize("way", ["sum", "stacked", "replay", "tensor"])
def test_each_mistake_is_a_sentence(way: str, losses: Any, message: str) -> None:
    net = Net()
    options = {"scope": "tensor"} if way == "tensor" else {"storage": "auto" if way == "sum" else way}
    surgery = surgery_on(net, "sum" if way == "sum" else "pcgrad", **options)

    def loss_fn(batch: Tensor, task_grads: Any) -> Any:
        return losses

    with pytest.raises(UserError, match=message):
        surgery.run([IDS], loss_fn)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 3, "b": -3}, "counts: task b: its number of rows is -3: give 0 or more"),
        ({"a": 3, "b": 3.0}, "counts: task b: its number of rows is 3.0: give an integer"),
        ({"a": 3}, "counts: task b has 3 rows in one micro-batch, counts gives it 0"),
    ],
)
def test_counts_are_numbers_of_rows(counts: Any, message: str) -> None:
    net = Net()
    with pytest.raises(UserError, match=message):
        surgery_on(net).backward(net(IDS), counts)


def gradients(net: Net, losses: Any = None, **options: Any) -> list[Tensor]:
    surgery_on(net, **options).backward(losses or net(IDS))
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("rows", [np.int64(3), torch.tensor(3)], ids=type)
def test_rows_of_any_integer_type(rows: Any) -> None:
    net, other = Net(), Net()
    found = gradients(net, {name: [loss, rows] for name, (loss, _) in net(IDS).items()})
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(other), strict=True))


def test_a_constant_of_a_task_without_rows_is_left_out() -> None:
    net, other = Net(), Net()
    surgery_on(net).backward({**net(IDS), "b": (torch.zeros(()), 0)})
    surgery_on(other).backward({"a": other(IDS)["a"]})
    assert net.heads[1].weight.grad is None
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_a_task_with_nothing_to_train_beside_others_where_nothing_shared_is() -> None:
    """A head without parameters on a frozen encoder: its loss is reported and has no gradient."""
    net, other = Net(), Net()
    for one in (net, other):
        for parameter in one.shared():
            parameter.requires_grad_(False)
    info = surgery_on(net, "sum", shared=[]).backward({**net(IDS), "b": (torch.tensor(6.0), 3)})
    other(IDS)["a"][0].div(3).backward()
    assert info.losses["b"] == 2
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_reentrant_checkpointing(method: str) -> None:
    """A sum is plain torch and supports it; surgery refuses it, and the other kind equals none."""
    expected = gradients(Net(), method=method)
    kinds = (True, False) if method == "sum" else (False,)
    for kind in kinds:
        found = gradients(Net(reentrant=kind), method=method)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    if method == "pcgrad":
        net = Net(reentrant=True)
        with pytest.raises(UserError, match='re-entrant activation checkpointing.*"use_reentrant": False'):
            surgery_on(net).backward(net(IDS))
        with pytest.raises(RuntimeError, match="second time"):  # no other error is converted
            net = Net()
            losses = net(IDS)
            losses["a"][0].backward()
            surgery_on(net).backward(losses)


def test_sparse_gradients() -> None:
    """Sparse gradients of a shared table and of a task's; SurgeryAdamW refuses those of a sum."""
    for more in ({}, {"sparse": "words"}, {"shared": "dense"}):
        net = Net(sparse=True)
        options: dict[str, Any] = {key: list(getattr(net, part).parameters()) for key, part in more.items()}
        with pytest.raises(
            UserError, match=r"number 0 of the optimiser of shape \(7, 4\) gets a sparse.* sparse=False"
        ):
            surgery_on(net, **options).backward(net(IDS))
    net = Net(sparse=True)
    optimizer = SurgeryAdamW(net.parameters())
    GradientSurgery(optimizer, "sum", tasks=["a", "b"]).backward(net(IDS))
    with pytest.raises(UserError, match="SurgeryAdamW takes no sparse gradients"):
        optimizer.step()
    assert gradients(Net(sparse=True), method="sum")[0].is_sparse
    dense = gradients(Net(), sparse=[])
    for a, b in zip(gradients((net := Net()), sparse=[net.words.weight]), dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("argument", "what", "message"),
    [
        (
            "shared",
            lambda net: net.dense.named_parameters(),
            "shared has pairs of names and parameters: use parameters",
        ),
        ("shared", lambda net: ["dense.weight"], "shared has 'dense.weight', which is no parameter"),
        ("shared", lambda net: "dense.weight", "shared is of type str, not a list"),
        ("shared", lambda net: net.dense, "shared is of type Linear, not a list: give .*parameters()"),
        ("shared", lambda net: net.dense.weight, "shared is of type Parameter, not a list"),
        ("shared", lambda net: 3, "shared is of type int, not a list"),
        ("sparse", lambda net: net.words.named_parameters(), "sparse has pairs of names and parameters"),
        ("sparse", lambda net: net.words.weight, "sparse is of type Parameter, not a list"),
        ("tasks", lambda net: iter(["a", "a"]), "tasks: a is listed twice"),
        ("method", lambda net: "PCGrad", "unknown gradient method 'PCGrad'. Did you mean 'pcgrad'"),
        ("method", lambda net: "GRADVAC", "Did you mean 'gradvac'"),
        ("method", lambda net: None, "gradient method: expected a name, got None. Valid: sum, pcgrad"),
    ],
)
def test_what_is_given_in_place_of_parameters_and_names(argument: str, what: Any, message: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters())
    with pytest.raises(UserError, match=message):
        GradientSurgery(optimizer, **{"tasks": ["a", "b"], "shared": net.shared(), argument: what(net)})


@pytest.mark.parametrize("sparse", [False, True])
def test_a_parameter_given_twice_counts_once(sparse: bool) -> None:
    """A decoder that is tied to the table gives it twice."""
    net, other = Net(), Net()
    table, twin = [net.words.weight], [other.words.weight]
    found = gradients(net, shared=[*net.shared(), *table], sparse=[*table, *table] if sparse else [])
    expected = gradients(other, sparse=twin if sparse else [])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_parameter_twice_in_one_group() -> None:
    """torch warns and takes two steps; its gradient is right, and SurgeryAdamW refuses it."""
    net, expected = Net(), gradients(Net())
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([*net.parameters(), net.dense.weight])
    GradientSurgery(optimizer, tasks=["a", "b"], shared=net.shared()).backward(net(IDS))
    assert all(torch.equal(p.grad, other) for p, other in zip(net.parameters(), expected, strict=True))  # type: ignore[arg-type]
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(UserError, match=r"\(4, 4\) is twice in one group"),
    ):
        SurgeryAdamW([*net.parameters(), net.dense.weight])
    with pytest.raises(UserError, match="listed twice"):
        FlatParameters(net, [{"params": [*net.parameters(), net.dense.weight]}])


def test_what_flat_parameters_are_made_of() -> None:
    """Generators are accepted, as by torch's optimisers; names of parameters are refused."""
    net = Net()
    flat = FlatParameters(net, [{"params": net.parameters()}], alone=list(net.words.parameters()))
    assert [p.numel() for p in flat.trained()] == [sum(p.numel() for p in net.parameters()) - 28, 28]
    with pytest.raises(UserError, match="alone has 'words.weight', which is no parameter"):
        FlatParameters(Net(), [{"params": list(net.parameters())}], alone=["words.weight"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="params has pairs of names and parameters"):
        FlatParameters(Net(), [{"params": net.named_parameters()}])
