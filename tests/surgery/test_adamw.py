"""SurgeryAdamW in a plain torch loop, compared with torch.optim.AdamW and clip_grad_norm_.

torch's optimiser gets the merged gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed_cases as cases
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fastmtl.errors import UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery, SurgeryAdamW
from fastmtl.surgery.norms import total_norm
from fastmtl.surgery.targets.find import find_target

TASKS = ["kind", "same", "degree"]
CLIP = 3.0
# Large enough that gradients of pure rounding, such as those of the keys' biases, change nothing.
EPS = 1e-3


def make() -> MultiTaskModel:
    return cases.make_model(cases.make_recipe(cases.Case(1, 1, "pcgrad")))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups: matrices have weight decay, the rest has its own learning rate."""
    parts = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    return [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0, "lr": 3e-3}]


def train(
    model: MultiTaskModel,
    optimizer: torch.optim.Optimizer,
    first: int,
    steps: int,
    scheduler: Any = None,
    **options: Any,
) -> list[float]:
    """Return the norms before clipping; torch's AdamW is clipped in the usual way."""
    surgery = GradientSurgery(
        optimizer,
        **{
            "tasks": TASKS,
            "shared": model.shared_parameters(),
            "sparse": model.sparse_parameters(),
            "task_weights": model.task_weights,
            **options,
        },
    )
    norms, data = [], cases.make_data()
    for step in range(first, first + steps):
        info = surgery.run([cases.step_batches(data, step % 3, 0, 1)], lambda b, task_grads: model(b, task_grads))
        assert info.skipped is None
        if not isinstance(optimizer, SurgeryAdamW):
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        if isinstance(optimizer, SurgeryAdamW):
            norms.append(float(optimizer.grad_norm))  # type: ignore[arg-type]
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return norms


def assert_same(ours: nn.Module, theirs: nn.Module, bound: float = 3e-6) -> None:
    expected = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        assert (value - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize(("sparse", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_twenty_steps_equal_torch(sparse: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCGrad with groups, a schedule and clipping; no merged gradient is formed, of no table."""
    models = ours, theirs = make(), make()
    options: dict[str, Any] = {"dtype": dtype, **({} if sparse else {"sparse": []})}
    optimizers = (
        SurgeryAdamW(groups(ours), lr=1e-3, eps=EPS, max_norm=CLIP),
        AdamW(groups(theirs), lr=1e-3, eps=EPS),
    )
    schedulers = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    expected = train(theirs, optimizers[1], 0, 20, schedulers[1], **options)
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    monkeypatch.setattr("fastmtl.surgery.sinks.stack.StackSink.combine", lambda *_: pytest.fail("merged"))
    found = train(ours, optimizers[0], 0, 20, schedulers[0], **options)
    assert found == pytest.approx(expected, rel=1e-4) and max(found) > CLIP > min(found)
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    assert max((now - then).abs().max() for now, then in zip(models[0].parameters(), start, strict=True)) > 1e-3
    # A weight's last bit may change the rounding of a number of J to bfloat16.
    assert_same(ours, theirs, 3e-6 if dtype == torch.float32 else 2e-5)
    for mine, other in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        assert mine["step"] == other["step"] == 20
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sum"},
        {"storage": "kept"},
        {"storage": "replay"},
        {"scope": "tensor"},
        {"reduce": "sketch"},
        {"reduce": "local"},
        {"method": "gradvac", "reduction": "mean"},
    ],
    ids=str,
)
def test_every_other_way_takes_the_same_step(options: dict[str, Any]) -> None:
    ours, theirs = make(), make()
    expected = train(theirs, AdamW(theirs.parameters(), lr=1e-3, eps=EPS), 0, 2, **options)
    found = train(ours, SurgeryAdamW(ours.parameters(), lr=1e-3, eps=EPS, max_norm=CLIP), 0, 2, **options)
    assert found == pytest.approx(expected, rel=1e-4)
    assert_same(ours, theirs)


@pytest.mark.parametrize("way", ["to torch", "from torch", "to itself"])
def test_the_state_goes_both_ways(way: str) -> None:
    ours, theirs = make(), make()
    mine = SurgeryAdamW(groups(ours), lr=1e-3, eps=EPS, max_norm=CLIP)
    torchs = AdamW(groups(theirs), lr=1e-3, eps=EPS, fused=True)
    train(ours, mine, 0, 3)
    train(theirs, torchs, 0, 3)
    model, source = (theirs, torchs) if way == "from torch" else (ours, mine)
    state, resumed = copy.deepcopy(source.state_dict()), copy.deepcopy(model)
    other: Any = AdamW(groups(resumed)) if way == "to torch" else SurgeryAdamW(groups(resumed), max_norm=CLIP)
    other.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [1e-3, 3e-3]
    train(resumed, other, 3, 3)
    train(ours, mine, 3, 3)
    assert_same(resumed, ours, 1e-5)
    assert {float(values["step"]) for values in other.state.values()} == {6.0}


class Half(nn.Module):
    """A bfloat16 model of torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(5, 1)
        self.bfloat16()

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, int]]:
        hidden = self.shared(x).tanh()
        return {"up": ((self.up(hidden) - 1).square().sum(), 8), "down": ((self.down(hidden) + 1).square().sum(), 8)}


def test_weights_of_bfloat16_parameters_are_float32() -> None:
    model = Half()
    optimizer = SurgeryAdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    surgery = GradientSurgery(optimizer, tasks=["up", "down"], shared=list(model.shared.parameters()))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    masters = {p: p.detach().float().requires_grad_() for p in model.parameters()}
    theirs = AdamW(list(masters.values()), lr=1e-3)

    def steps(count: int) -> None:
        for _ in range(count):
            surgery.run([x], model)
            assert optimizer._update is not None
            update = optimizer._update
            for parameter, master in masters.items():
                rows = update.dense.get(id(parameter))
                merged = None if rows is None else sum(w * row for w, row in zip(update.weights, rows, strict=True))
                master.grad = update.own[id(parameter)].clone() if merged is None else merged
            torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
            theirs.step()
            optimizer.step()

    steps(4)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(4)
    for parameter, master in masters.items():
        kept = optimizer.state[parameter]["master"]
        assert kept.dtype == torch.float32 and (kept - master).abs().max() <= 1e-6
        assert torch.equal(parameter, kept.bfloat16()) and not torch.equal(kept, parameter.float())
    plain = AdamW(model.parameters(), lr=1e-3)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    plain.state[model.up.bias].pop("master")
    optimizer.load_state_dict(plain.state_dict())
    assert torch.equal(optimizer.state[model.up.bias]["master"], model.up.bias.float())


def two(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], **options: Any) -> Any:
    """Return a weight that two tasks share, its optimiser, and a step of surgery."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = SurgeryAdamW([weight], lr=0.1, **options)
    surgery = GradientSurgery(optimizer, tasks=["a", "b"])
    return weight, optimizer, lambda: surgery.run([0], lambda _: {"a": (first(weight), 1), "b": (second(weight), 1)})


def test_a_norm_that_cancels_is_taken_from_the_merged_gradient() -> None:
    """The Gramian's inner products cannot resolve gradients that are nearly opposite."""
    direction = torch.tensor([0.3, -0.7, 0.2])
    weight, optimizer, step = two(
        lambda w: w @ direction, lambda w: w @ (direction * torch.tensor([-1.0, -1.0, -1.001])), max_norm=1e-6
    )
    step()
    assert weight.grad is not None
    norm = float(weight.grad.norm())
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norm) and 0 < norm < 1e-3


def test_a_gradient_that_is_there_already_is_added_to() -> None:
    weight, optimizer, step = two(lambda w: w.sum(), lambda w: w.square().sum())
    weight.sum().backward()
    step()
    torch.testing.assert_close(weight.grad, 1 + 1 + 2 * weight.detach())
    optimizer.zero_grad()
    step()
    assert weight.grad is None
    weight.sum().backward()
    with pytest.raises(UserError, match=r"a backward of your own before surgery\.run"):
        optimizer.step()


def test_gradients_are_used_once_or_dropped() -> None:
    weight, optimizer, step = two(lambda w: w.sum(), lambda w: w.square().sum())
    step()
    with pytest.raises(UserError, match="not used yet: call optimizer.step"):
        step()
    optimizer.zero_grad()
    optimizer.step()  # like torch's, without a gradient
    assert torch.equal(weight, torch.tensor([1.0, 2.0, 3.0])) and not optimizer.state
    step()
    optimizer.step()
    moved = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(moved, torch.tensor([1.0, 2.0, 3.0])) and torch.equal(moved, weight)


def test_a_step_that_is_skipped_changes_nothing() -> None:
    weight, optimizer, step = two(lambda w: w.sum(), lambda w: (w * float("inf")).sum(), max_norm=1.0)
    assert step().skipped == "b"
    optimizer.step()
    assert torch.equal(weight, torch.tensor([1.0, 2.0, 3.0])) and not optimizer.state


def test_a_parameter_without_a_gradient_is_left_alone_and_a_closure_is_called() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SurgeryAdamW([used, unused], lr=0.1, max_norm=1.0)

    def closure() -> Tensor:
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert not torch.equal(used, torch.ones(3)) and torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state and float(optimizer.grad_norm) == pytest.approx(12**0.5)  # type: ignore[arg-type]
    assert copy.deepcopy(optimizer).max_norm == 1.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_norm": 0.0}, "max_norm must be above 0, got 0.0"),
        ({"lr": -1.0}, "learning rate"),
        ({"betas": (0.9, 1.0)}, "beta"),
        ({"lr": torch.tensor(0.1)}, "number"),
        ({"params": []}, "empty"),
        ({"params": [{"params": [nn.Parameter(torch.ones(2))], "amsgrad": True}]}, "does not take amsgrad"),
        ({"params": [{"params": [nn.Parameter(torch.ones(2))], "fused": True}]}, "does not take fused"),
        ({"params": [nn.Parameter(torch.ones(4, 3).T)]}, r"shape \(3, 4\) .*not contiguous"),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "not real"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SurgeryAdamW(**{"params": [nn.Parameter(torch.ones(2))], **wrong})


def test_bad_states_and_gradients() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    others = AdamW([parameter], amsgrad=True), torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    for other in others:
        other.step()
    with pytest.raises(UserError, match="AdamW with amsgrad"):
        SurgeryAdamW([parameter]).load_state_dict(others[0].state_dict())
    with pytest.raises(UserError, match="momentum_buffer and is not of AdamW"):
        SurgeryAdamW([parameter]).load_state_dict(others[1].state_dict())
    with pytest.raises(UserError, match="parameter group"):
        SurgeryAdamW([parameter, nn.Parameter(torch.ones(1))]).load_state_dict(SurgeryAdamW([parameter]).state_dict())
    parameter.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(UserError, match="sparse=False"):
        SurgeryAdamW([parameter]).step()


def test_deepspeed_is_told_of_its_own_optimiser() -> None:
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: 0,
        module=nn.Linear(1, 1),
        device="cpu",
        basic_optimizer=SurgeryAdamW([nn.Parameter(torch.ones(1))]),
    )
    with pytest.raises(UserError, match="SurgeryAdamW is for a plain torch loop"):
        find_target(engine)


def test_the_norm_of_numbers_of_16_bits() -> None:
    """The norm is not rounded to 16 bits; with another dtype beside, and a non-contiguous shape."""
    parts = [torch.full((50, 70), 3.0, dtype=torch.bfloat16).t(), torch.full((41,), 2.0), torch.ones(0)]
    assert float(total_norm(parts)) == pytest.approx((9 * 3500 + 4 * 41) ** 0.5, rel=1e-6)


def test_the_norm_of_many_numbers() -> None:
    """A part of J, and a `.grad`: a single float32 sum of squares would lose some per cent."""
    big = nn.Parameter(torch.zeros(1 << 24))
    optimizer = SurgeryAdamW([big, nn.Parameter(torch.zeros(3))], max_norm=1.0)
    surgery = GradientSurgery(optimizer, tasks=["all"], shared=[big])
    expected = 1e-3 * 2**12
    surgery.backward({"all": (big.sum() * 1e-3, 1)})
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
    optimizer.zero_grad()
    big.grad = torch.full_like(big, 1e-3)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
