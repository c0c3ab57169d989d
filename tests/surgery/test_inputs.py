"""Inputs of GradientSurgery: an error message for each mistake, also for non-finite values."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from surgery_cases import TASKS, batch, make, surgery_on
from torch import Tensor, nn

from fastmtl.errors import TrainingError, UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods import torchjd as torchjd_methods
from fastmtl.surgery.methods.table import find_method

NEEDED: dict[str, dict[str, Any]] = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}, "krum": {"n_byzantine": 1}}


def on(model: MultiTaskModel, **options: Any) -> GradientSurgery:
    optimizer = torch.optim.SGD(model.parameters())
    return GradientSurgery(optimizer, tasks=TASKS, shared=model.shared_parameters(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["kind", "kind", "degree"]}, "tasks: kind is listed twice"),
        ({"tasks": []}, "tasks: give the list of their names"),
        ({"tasks": "kind"}, "tasks: give the list of their names"),
        ({"task_weights": {"kid": 1.0}}, "kid.*kind"),
        ({"task_weights": {"kind": float("nan")}}, "task_weights: kind: nan"),
        ({"task_weights": {"kind": "1"}}, "task_weights: kind: '1' must be a number"),
        ({"task_weights": {"kind": -1.0}}, "task_weights: kind: -1.0"),
        ({"shared": [nn.Parameter(torch.zeros(2, 5))]}, r"shared: 1 parameters are not the target's .*\(2, 5\)"),
        ({"sparse": [nn.Parameter(torch.zeros(2, 5))]}, r"sparse: .*\(2, 5\) is not among the shared"),
        ({"reduction": "avg"}, "reduction must be sum or mean"),
        ({"reduction": "mean", "method": "upgrad"}, "reduction='mean' is for pcgrad and gradvac"),
        ({"method": "krum"}, "krum needs the option n_byzantine"),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(UserError, match=message):
        GradientSurgery(optimizer, **{"tasks": TASKS, "shared": model.shared_parameters(), **arguments})


def test_a_sketch_holds_a_row_of_each_table() -> None:
    model = make()
    with pytest.raises(UserError, match="sketch_size=16 is less than a row of an embedding table: use 40"):
        table = nn.Parameter(torch.zeros(3, 40))
        GradientSurgery(
            torch.optim.SGD([*model.parameters(), table]), tasks=TASKS, sparse=[table], reduce="sketch", sketch_size=16
        )


def test_a_bias_is_no_embedding_table() -> None:
    model = make()
    bias = next(p for p in model.shared_parameters() if p.ndim == 1)
    with pytest.raises(UserError, match="sparse: an embedding table has two dimensions"):
        on(model, sparse=[bias])


def test_a_linear_layers_weight_is_no_embedding_table() -> None:
    model = make()
    weight = model.encoder.encoder.layer[0].output.dense.weight
    with pytest.raises(UserError, match="sparse: .*dense gradient"):
        on(model, sparse=[weight]).run([batch()], lambda b, task_grads: model(b, task_grads))


def test_counts_of_an_unknown_task() -> None:
    model = make()
    with pytest.raises(UserError, match="counts: of sam, tasks are kind, same, degree"):
        surgery_on(model).run([batch()], lambda b, task_grads: model(b, task_grads), {"kind": 8, "sam": 3, "degree": 8})


def test_a_frozen_encoder_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    info = surgery_on(model).run([batch()], lambda b, task_grads: model(b, task_grads))
    assert info.cosines is None
    assert "no shared parameter is trained" in caplog.text


@pytest.mark.parametrize("method", torchjd_methods.names())
def test_a_task_without_a_gradient_takes_no_part(method: str) -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    gram = rows @ rows.T
    options = NEEDED.get(method, {})
    weights = find_method(method, options=options).weights(gram, torch.zeros(0))
    present = [0, 1, 3, 4]
    expected = find_method(method, options=options).weights(gram[present][:, present], torch.zeros(0))
    assert weights[2] == 0
    torch.testing.assert_close(weights[present], expected, rtol=1e-3, atol=1e-3)
    assert expected.abs().sum() > 0


def test_preferences_are_of_the_tasks_that_are_there() -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    weights = find_method("upgrad", options={"pref_vector": [1.0, 5.0, 2.0]}).weights(rows @ rows.T, torch.zeros(0))
    pair = rows[[0, 2]]
    expected = find_method("upgrad", options={"pref_vector": [1.0, 2.0]}).weights(pair @ pair.T, torch.zeros(0))
    torch.testing.assert_close(weights[[0, 2]], expected)


def test_too_few_tasks_for_a_solver_is_a_sentence() -> None:
    rows = torch.randn(4, 40)
    rows[1] = 0
    with pytest.raises(UserError, match="gradient method krum cannot solve this step's tasks"):
        find_method("krum", options={"n_byzantine": 1}).weights(rows @ rows.T, torch.zeros(0))


@pytest.mark.parametrize(("saved", "other"), list(itertools.permutations(["pcgrad", "gradvac", "upgrad", "sum"], 2)))
def test_a_state_of_another_method_is_refused(saved: str, other: str) -> None:
    state = json.loads(json.dumps(surgery_on(make(), saved).state_dict()))
    surgery_on(make(), saved).load_state_dict(state)
    with pytest.raises(UserError, match=f"gradient method {saved}, not {other}"):
        surgery_on(make(), other).load_state_dict(state)


class Broken(torch.autograd.Function):
    """An identity whose parameter gets a non-finite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = parameter
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.full_like(ctx.like, float("nan"))


@pytest.mark.parametrize("options", [{"storage": "replay"}, {"scope": "tensor"}], ids=str)
def test_an_own_gradient_that_is_not_finite_stops_before_the_update(options: dict) -> None:
    model = make()
    bias = next(p for n, p in model.named_parameters() if n.startswith("heads.") and n.endswith("bias"))
    surgery = on(model, sparse=model.sparse_parameters(), **options)
    number = next(k for k, p in enumerate(model.parameters()) if p is bias)

    def loss_fn(b: Any, task_grads: Any) -> Any:
        losses = dict(model(b, task_grads))
        first = next(iter(losses))
        losses[first] = (Broken.apply(losses[first][0], bias), losses[first][1])
        return losses

    with pytest.raises(
        TrainingError, match=f"gradient of number {number} of the optimiser is not finite at step 1, before its update"
    ):
        surgery.run([batch()], loss_fn)


def test_stacked_skips_it() -> None:
    model = make()
    bias = next(p for n, p in model.named_parameters() if n.startswith("heads.") and n.endswith("bias"))

    def loss_fn(b: Any, task_grads: Any) -> Any:
        losses = dict(model(b, task_grads))
        first = next(iter(losses))
        losses[first] = (Broken.apply(losses[first][0], bias), losses[first][1])
        return losses

    info = surgery_on(model).run([batch()], loss_fn)
    assert info.skipped is not None and all(p.grad is None for p in model.parameters())
