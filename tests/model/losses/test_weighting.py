"""Learned and dynamic loss weights, compared with their formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from fastmtl.config import OptimizerConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.losses.weighting import (
    DynamicWeightAverage,
    ExcessMTL,
    Famo,
    GradNorm,
    ImpartialScale,
    RandomWeights,
    SmoothTchebycheff,
    Uncertainty,
    gradient_weights,
)
from fastmtl.model.losses.weighting.batch_weights import weighted
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.info import SurgeryInfo

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
            average.after_step(SurgeryInfo(losses=step))
            state = json.loads(json.dumps(average.state_dict()))
            average = DynamicWeightAverage(["a", "b", "c"], temperature=2.0)
            average.load_state_dict(state)
        average.after_epoch()
    powers = [math.exp(1.5 / 3.0 / 2), math.exp(2.0 / 2.0 / 2), math.exp(1.0 / 2)]  # c has no loss in the second epoch
    expected = [3 * power / sum(powers) for power in powers]
    assert list(average.weights().values()) == pytest.approx(expected)
    assert sum(average.weights().values()) == pytest.approx(3.0)
    assert average.weights()["a"] < 1 < average.weights()["b"]  # a loss that falls faster gets less weight


def gradients_of(scalarizer: torch.nn.Module, losses: torch.Tensor) -> torch.Tensor:
    """Return the gradient of TorchJD's scalarisation of losses [T], times T."""
    losses = losses.clone().requires_grad_()
    return len(losses) * torch.autograd.grad(scalarizer(losses), losses)[0]


def weights_of(by: SmoothTchebycheff | Famo, losses: torch.Tensor, terms: list[int]) -> torch.Tensor:
    """Return the gradients of weighted losses, whose means are `losses`."""
    sums = [(loss * count).requires_grad_() for loss, count in zip(losses, terms, strict=True)]
    found = weighted(sums, terms, by)
    torch.testing.assert_close(torch.stack(found), torch.stack(sums))  # the values are the unweighted losses
    return torch.stack(torch.autograd.grad(torch.stack(found).sum(), sums))


def test_smooth_tchebycheff_equals_torchjd() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    losses = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)
    for mu in (0.05, 1.0):
        expected = 3 * gradients_of(scalarization.STCH(mu), losses)  # ours add up to T, its gradients to 1 / T
        torch.testing.assert_close(weights_of(SmoothTchebycheff(mu), losses, [4, 1, 7]), expected)
    two = weights_of(SmoothTchebycheff(0.5), torch.tensor([0.3, 0.0, 1.1], dtype=torch.float64), [2, 0, 3])
    expected = 2 * gradients_of(scalarization.STCH(0.5), losses[[0, 2]])
    torch.testing.assert_close(two[[0, 2]], expected)
    assert two[1] == 0  # a task without rows takes no share


def test_famo_equals_torchjd_over_steps_and_a_resume() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    theirs, ours = scalarization.FAMO(3), Famo(["a", "b", "c"], 0.025, 1e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        before, after = (0.1 + torch.rand(2, 3, generator=random)).unbind()
        torch.testing.assert_close(weights_of(ours, before, [2, 5, 1]), gradients_of(theirs, before), rtol=1e-5, atol=0)
        theirs(before)
        theirs.update(after)
        ours.after_step(*(dict(zip("abc", losses.tolist(), strict=True)) for losses in (before, after)))
        state = json.loads(json.dumps(ours.state_dict()))
        ours = Famo(["a", "b", "c"], 0.025, 1e-3)
        ours.load_state_dict(state)


def test_impartial_scale_equals_torchjd() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    theirs, ours = scalarization.IMTLL(1).double(), ImpartialScale().double()
    with torch.no_grad():
        theirs.log_scale.fill_(0.7)
        ours.log_scale_bias.fill_(0.7)
    loss = torch.tensor([6.0], dtype=torch.float64, requires_grad=True)
    found = ours(loss[0], 3) / 3
    assert found.item() == 2.0
    expected = torch.autograd.grad(theirs(loss / 3), (loss, theirs.log_scale))
    for one, other in zip(torch.autograd.grad(found, (loss, ours.log_scale_bias)), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_random_weights_are_those_of_the_step() -> None:
    """The weights differ from step to step, add up to T and have the distribution of TorchJD's."""
    names = ["a", "b", "c"]
    weights = RandomWeights(names, seed=4)
    drawn = []
    for _ in range(2000):
        drawn.append(list(weights.weights().values()))
        assert list(weights.weights().values()) == drawn[-1]
        weights.after_step(SurgeryInfo(losses={}))
    again = RandomWeights(names, seed=4)
    again.load_state_dict({"step": 1999})
    assert list(again.weights().values()) == drawn[-1]
    found = torch.tensor(drawn)
    torch.testing.assert_close(found.sum(1), torch.full((2000,), 3.0))
    normal = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)).softmax(1) * 3
    torch.testing.assert_close(found.mean(0), normal.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(found.std(0), normal.std(0), atol=0.06, rtol=0)


def test_gradnorm_against_its_formula() -> None:
    """One step from equal weights, and many steps until the weighted norms meet their targets."""
    names = ["a", "b", "c"]
    weights = GradNorm(names, [1.0, 2.0, 1.0], alpha=1.0, lr=0.01)
    norms = torch.tensor([4.0, 1.0, 2.0])  # of gradients without any weight
    fixed = torch.tensor([1.0, 2.0, 1.0])

    def step(losses: dict[str, float]) -> None:
        w = torch.tensor(list(weights.weights().values()))
        weights.after_step(SurgeryInfo(losses=losses, task_norms=w * fixed * norms))
        state = json.loads(json.dumps(weights.state_dict()))
        weights.load_state_dict(state)

    step({"a": 1.0, "b": 1.0, "c": 1.0})
    # Adam's first step has the length lr against the gradient's sign; the target is 7 / 3.
    expected = torch.tensor([0.99, 1.01, 1.01])
    torch.testing.assert_close(torch.tensor(list(weights.weights().values())), 3 * expected / expected.sum())
    for _ in range(2000):
        step({"a": 0.5, "b": 0.5, "c": 1.0})
    w = torch.tensor(list(weights.weights().values()))
    rates = torch.tensor([0.5, 0.5, 1.0])
    target = (w * norms).mean() * rates / rates.mean()
    torch.testing.assert_close(w * norms, target, rtol=0.05, atol=0)


def test_gradnorm_needs_the_norms(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="gradnorm needs the norms.*gradient.method: equal"):
        make_model(weighting={"name": "gradnorm"})
    assert make_model(weighting={"name": "gradnorm"}, gradient={"method": "equal"}) is not None


def test_excess_mtl_needs_exact_task_gradients(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="excess_mtl needs the tasks' gradients of shared.*gradient.method: equal"):
        make_model(weighting={"name": "excess_mtl"})
    for given in ({"storage": "kept"}, {"reduce": "sketch"}, {"reduce": "local"}):
        with pytest.raises(UserError, match="excess_mtl needs the tasks' gradients of all ranks"):
            make_model(weighting={"name": "excess_mtl"}, gradient={"method": "pcgrad", **given})
    model = make_model(weighting={"name": "excess_mtl", "step_size": 0.5}, gradient={"method": "pcgrad"})
    assert isinstance(gradient_weights(model.recipe), ExcessMTL)
