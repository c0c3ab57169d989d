"""Weights that follow excess risks (ExcessMTL), compared with their formula and with TorchJD's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from surgery_cases import COUNTS, batch, make, surgery_on
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.model.losses.weighting import ExcessMTL
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.balance import Balance
from fastmtl.surgery.methods.order import draw_order
from fastmtl_kernels import pcgrad_weights

STEPS = 6


def jacobians(steps: int = STEPS) -> list[Tensor]:
    """Return J [3, 21] of some steps, float64."""
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 0.1, 3.0], dtype=torch.float64)[:, None]
    return [scales * torch.randn(3, 21, generator=random, dtype=torch.float64) for _ in range(steps)]


def of_formula(steps: list[Tensor], step_size: float, warmup: int) -> list[Tensor]:
    """Return the weights of He et al., equations 6, 7 and 9, with a baseline from the warm-up."""
    sums, baseline, found = torch.zeros_like(steps[0]), steps[0].new_zeros(3), []
    weights = steps[0].new_full((3,), 1 / 3)
    for number, jacobian in enumerate(steps):
        sums = sums + jacobian**2
        risks = (jacobian**2 / (sums + 1e-7).sqrt()).sum(1)
        if number < warmup:
            baseline = baseline + risks / warmup
        else:
            if number == warmup == 0:
                baseline = risks
            else:
                risks = risks / (baseline + 1e-7)
            weights = weights * (step_size * risks).exp()
            weights = weights / weights.sum()
        found.append(3 * weights)
    return found


def weights_of(balance: Balance, jacobian: Tensor, keys: tuple[int, ...], *, accepted: bool = True) -> Tensor:
    """Return the weights for J with a loss scale; the last 6 columns belong to a table [3, 2]."""
    balance.begin(256.0)
    balance.take(keys[:-1], 256 * jacobian[:, :15])
    ids = torch.tensor([0, 1, 1, 2])  # the second place of an id holds zeros
    rows = [256 * row.view(3, 2)[[0, 1, 1, 2]] for row in jacobian[:, 15:]]
    balance.take_table(keys[-1], [(ids, row * torch.tensor([[1], [1], [0], [1]])) for row in rows])
    weights = balance.weights(jacobian @ jacobian.T)
    balance.finish(accepted=accepted)
    return weights


def make_balance(step_size: float, warmup: int) -> tuple[Balance, tuple[int, ...], list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (3,), (3, 2))]
    balance = Balance(ExcessMTL(3, step_size, warmup), parameters, 3)
    return balance, tuple(map(id, parameters)), parameters


@pytest.mark.parametrize(("step_size", "warmup"), [(0.1, 0), (0.7, 1), (0.7, 3)])
def test_weights_equal_the_formula_and_torchjd(step_size: float, warmup: int) -> None:
    balance, keys, _ = make_balance(step_size, warmup)
    found = [weights_of(balance, jacobian, keys) for jacobian in jacobians()]
    for ours, expected in zip(found, of_formula(jacobians(), step_size, warmup), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert (found[-1] - 1).abs().max() > 0.05
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = aggregation.ExcessMTLWeighting(step_size, warmup)
    for ours, jacobian in zip(found, jacobians(), strict=True):
        torch.testing.assert_close(ours, 3 * theirs(jacobian), rtol=1e-12, atol=1e-14)


def test_a_skipped_step_leaves_no_trace_and_a_resume_has_the_same_bits() -> None:
    balance, keys, parameters = make_balance(0.5, 2)
    plain, plain_keys, _ = make_balance(0.5, 2)
    names = dict(zip(keys, ("a.weight", "a.bias", "words"), strict=True))
    for number, jacobian in enumerate(jacobians()):
        broken = jacobian.clone()
        broken[1, number] = float("nan")
        weights_of(balance, broken, keys, accepted=False)
        state, tensors = json.loads(json.dumps(balance.state_dict())), balance.tensors(names)
        balance = Balance(ExcessMTL(3, 0.5, 2), parameters, 3)
        balance.load_state_dict(state)
        balance.load_tensors({"teacher": torch.zeros(1), **tensors}, names)
        unused = balance.tensors(names)
        assert unused.keys() == tensors.keys() and all(torch.equal(unused[name], tensors[name]) for name in tensors)
        assert torch.equal(weights_of(balance, jacobian, keys), weights_of(plain, jacobian, plain_keys))
    assert {name: tuple(sums.shape) for name, sums in balance.tensors(names).items()} == {
        "squares.a.weight": (3, 3, 4),
        "squares.a.bias": (3, 3),
        "squares.words": (3, 3, 2),
    }


def test_a_task_without_a_gradient_keeps_its_weight_and_its_warm_up() -> None:
    balance, keys, _ = make_balance(0.5, 1)
    first, *others = jacobians()
    weights_of(balance, first * torch.tensor([[1], [0], [1]]), keys)
    before = weights_of(balance, others[0], keys)  # the warm-up of the second task alone
    assert before[1] == 1
    after = weights_of(balance, others[1] * torch.tensor([[0], [1], [1]]), keys)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after.sum(), torch.tensor(3.0, dtype=after.dtype))
    assert after[1] != before[1]


def train(storage: Any, parts: int) -> tuple[MultiTaskModel, list[Tensor]]:
    """Return a model after steps with weights from excess risks, and the weights."""
    model, weights = make(), []
    surgery = surgery_on(model, "equal", storage=storage, balance=ExcessMTL(3, 0.5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        info = surgery.run([batch(p, parts) for p in range(parts)], lambda b, task_grads: model(b, task_grads), COUNTS)
        assert info.weights is not None
        weights.append(info.weights)
        optimizer.step()
        optimizer.zero_grad()
    return model, weights


@pytest.mark.parametrize(("storage", "parts"), [("stacked", 2), ("replay", 1), ("replay", 2)])
def test_storages_and_micro_batches_give_the_same_steps(storage: str, parts: int) -> None:
    (expected, weights), (model, found) = train("stacked", 1), train(storage, parts)
    assert weights[0].tolist() == [1, 1, 1] and (weights[2] - 1).abs().max() > 0.01
    torch.testing.assert_close(torch.stack(found), torch.stack(weights), rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


class Constant(ExcessMTL):
    def weights(self, risks: Tensor, present: Tensor) -> Tensor:
        super().weights(risks, present)
        return torch.tensor([0.2, 2.0, 0.8], dtype=risks.dtype)


def test_surgery_sees_the_weighted_gradients() -> None:
    surgery = surgery_on(model := make(), "pcgrad", balance=Constant(3))
    info = surgery.run([batch()], lambda b, task_grads: model(b, task_grads))
    assert info.cosines is not None and info.task_norms is not None and (info.cosines < 0).any()
    gram, factors = info.cosines * torch.outer(info.task_norms, info.task_norms), torch.tensor([0.2, 2.0, 0.8])
    order = draw_order(3, 3, 1)
    expected = factors * pcgrad_weights(gram * torch.outer(factors, factors), order=order)
    torch.testing.assert_close(info.weights, expected, rtol=1e-4, atol=1e-5)
    assert (expected - factors * pcgrad_weights(gram, order=order)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "sum"}, 'the method "sum" takes no task gradients: use "equal"'),
        ({"storage": "kept"}, "needs the columns of J.*not storage='kept'"),
        ({"scope": "tensor"}, "needs the columns of J.*scope='tensor'"),
        ({"reduce": "sketch"}, "needs the columns of J.*reduce='sketch'"),
    ],
)
def test_steps_without_all_columns_are_refused(more: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        surgery_on(make(), **{"method": "pcgrad", "balance": ExcessMTL(3), **more})  # type: ignore[arg-type]


def test_features_and_a_state_without_risks_are_refused() -> None:
    model = make()
    surgery = surgery_on(model, balance=ExcessMTL(3))
    with pytest.raises(UserError, match="leave features out"):
        surgery.run([batch()], lambda b: ({}, b), features=True)
    with pytest.raises(UserError, match="did not follow excess risks: keep its weighting"):
        surgery.load_state_dict(surgery_on(model).state_dict())
