"""Learned and dynamic loss weights, compared with their formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from fastmtl.config import OptimizerConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.losses.weighting import DynamicWeightAverage, Uncertainty
from fastmtl.model.multitask import MultiTaskModel

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]


@pytest.mark.parametrize("squared_error", [False, True])
def test_uncertainty(squared_error: bool) -> None:
    module = Uncertainty(squared_error=squared_error).double()
    with torch.no_grad():
        module.log_variance_bias.fill_(math.log(0.25))
    loss = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    found = module(loss, 3) / 3
    assert found.item() == 2.0  # the unweighted mean
    s = module.log_variance_bias
    mean = loss / 3
    expected = (0.5 if squared_error else 1.0) * (-s).exp() * mean + s / 2
    for ours, theirs in zip(
        torch.autograd.grad(found, (loss, s)), torch.autograd.grad(expected, (loss, s)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_every_task_has_its_own_and_it_is_the_tasks(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(weighting={"name": "uncertainty"}).eval()
    plain = make_model().eval()
    batch = make_batch([[5, 1, 9], [7, 12], [6, 3, 8, 8]], pairs=[False, False, True])
    found, expected = model(batch), plain(batch)
    total = sum(loss / count for loss, count in found.values())
    total.backward()
    for head, (loss, count) in zip(model.heads, expected.values(), strict=True):
        factor = 0.5 if head is model.heads[2] else 1.0
        gradient = head.uncertainty.log_variance_bias.grad
        torch.testing.assert_close(gradient, (0.5 - factor * loss / count).detach()[None])
    assert {name: loss.item() for name, (loss, _) in found.items()} == {n: x.item() for n, (x, _) in expected.items()}
    decays = {
        id(p): group["weight_decay"] for group in model.parameter_groups(OptimizerConfig()) for p in group["params"]
    }
    assert all(decays[id(head.uncertainty.log_variance_bias)] == 0 for head in model.heads)


def test_dynamic_weight_average() -> None:
    average = DynamicWeightAverage(["a", "b", "c"], temperature=2.0)
    epochs = [
        [{"a": 4.0, "b": 1.0}, {"a": 2.0, "b": 3.0, "c": 8.0}],
        [{"a": 1.5, "b": 2.0}, {"a": 1.5, "b": float("nan")}],
    ]
    for number, steps in enumerate(epochs):
        assert average.weights() == {"a": 1.0, "b": 1.0, "c": 1.0}, number
        for step in steps:
            average.after_step(step)
            state = json.loads(json.dumps(average.state_dict()))
            average = DynamicWeightAverage(["a", "b", "c"], temperature=2.0)
            average.load_state_dict(state)
        average.after_epoch()
    powers = [math.exp(1.5 / 3.0 / 2), math.exp(2.0 / 2.0 / 2), math.exp(1.0 / 2)]  # c has no loss in the second epoch
    expected = [3 * power / sum(powers) for power in powers]
    assert list(average.weights().values()) == pytest.approx(expected)
    assert sum(average.weights().values()) == pytest.approx(3.0)
    assert average.weights()["a"] < 1 < average.weights()["b"]  # a loss that falls faster gets less weight
