"""Clipping by surgery's norm, compared with torch's clipping of the gradients handed over."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import deepspeed_cases as cases
import pytest
import torch
from op_recorder import OpRecorder
from torch import Tensor, nn

from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.errors import TrainingError, UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery, SurgeryAdamW, SurgeryInfo

TASKS = ["kind", "same", "degree"]
BATCHES = [cases.step_batches(cases.make_data(), 0, part, 2) for part in range(2)]
COUNTS = {"kind": 8, "same": 3, "degree": 8}


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return cases.make_model(cases.make_recipe(cases.Case(1, 1, "pcgrad")))


def step(
    model: MultiTaskModel, method: str, recorder: OpRecorder | None = None, **more: Any
) -> tuple[SurgeryInfo, dict[str, Tensor]]:
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1),
        method,
        **{"tasks": TASKS, "shared": model.shared_parameters(), "sparse": model.sparse_parameters(), "seed": 3, **more},
    )
    if recorder is not None:
        surgery.record_with(partial(record_merging, recorder=recorder))
    info = surgery.run(BATCHES, lambda batch, task_grads: model(batch, task_grads), COUNTS)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return info, found


@pytest.mark.parametrize("way", ["sum", "pcgrad", "gradvac", "recorded"])
def test_clips_as_torch_does(model: MultiTaskModel, way: str) -> None:
    method = "pcgrad" if way == "recorded" else way
    recorder = OpRecorder() if way == "recorded" else None
    _, plain = step(model, method)
    norm = float(torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in plain.values()])))
    for bound in (0.3 * norm, 2 * norm, math.inf):
        info, found = step(model, method, recorder, max_norm=bound)
        assert info.total_norm == pytest.approx(norm, rel=1e-5)
        if way != "sum":
            assert info.own_norm is not None and info.merged_norm is not None
            assert math.hypot(info.own_norm, info.merged_norm) == pytest.approx(norm, rel=1e-5)
        for name, gradient in plain.items():
            expected = gradient * min(1.0, bound / (norm + 1e-6))
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 * norm, msg=name)
    assert recorder is None or recorder.replayed


class Opposed(nn.Module):
    """Two tasks whose gradients of `shared` cancel except for a millionth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Parameter(torch.randn(64, 64))

    def losses(self) -> dict[str, tuple[Tensor, int]]:
        total = (self.shared * 1e3).sum()
        return {"a": (total + self.shared[0, 0] * 0.01, 1), "b": (-total, 1)}


def test_the_norm_of_what_cancels_is_measured() -> None:
    """G's float32 inner products would give an arbitrary norm."""
    net = Opposed()
    surgery = GradientSurgery(torch.optim.SGD(net.parameters(), lr=1.0), "gradvac", tasks=["a", "b"], max_norm=1e-3)
    info = surgery.backward(net.losses())
    assert info is not None and net.shared.grad is not None
    found = float(net.shared.grad.double().norm())
    assert info.total_norm is not None and found == pytest.approx(1e-3, rel=1e-3)


def test_a_sum_that_is_not_finite_is_skipped_and_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

        def losses(self) -> dict[str, tuple[Tensor, int]]:
            # The derivative of the square root at 0 is infinite, its value is finite.
            return {"a": (self.good.sum() + self.bad.sqrt().sum(), 1)}

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    surgery = GradientSurgery(optimizer, "sum", tasks=["a"], max_norm=1.0)
    info = surgery.backward(net.losses())
    assert info is not None and info.skipped == "number 1 of the optimiser" and info.losses == {"a": 3.0}
    assert net.good.grad is None and net.bad.grad is None
    with pytest.raises(TrainingError, match="number 1 of the optimiser was not finite in 5 steps in a row"):
        for _ in range(4):
            surgery.backward(net.losses())


def test_asks_every_rank_to_stop(model: MultiTaskModel) -> None:
    for method in ("sum", "pcgrad"):
        for more in ({}, {"storage": "replay"}, {"scope": "tensor"}):
            surgery = GradientSurgery(
                torch.optim.SGD(model.parameters(), lr=0.1),
                method,
                tasks=TASKS,
                shared=model.shared_parameters(),
                sparse=model.sparse_parameters(),
                **more,  # type: ignore[arg-type]
            )
            infos = [
                surgery.run(BATCHES, lambda batch, task_grads: model(batch, task_grads), COUNTS, stop=stop)
                for stop in (False, True)
            ]
            assert [info.stop for info in infos] == [False, True]
            assert infos[0].losses == pytest.approx(infos[1].losses)
    model.zero_grad()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("pcgrad", {"max_norm": 0.0}, "max_norm must be above 0, got 0.0"),
        ("pcgrad", {"max_norm": 1.0, "storage": "replay"}, "storage='replay' and scope='tensor' merge inside"),
        ("pcgrad", {"max_norm": 1.0, "scope": "tensor"}, "storage='replay' and scope='tensor' merge inside"),
        (
            "pcgrad",
            {"max_norm": 1.0, "reduce": "local"},
            "reduce='local' does not .*call .*clip_grad_norm_",
        ),
        ("pcgrad", {"max_norm": 1.0, "reduce": "sketch", "sketch_size": 64}, "reduce='sketch' does not give the norm"),
    ],
)
def test_where_surgery_cannot_clip(model: MultiTaskModel, method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step(model, method, **options)
    with pytest.raises(UserError, match="SurgeryAdamW clips by its own max_norm"):
        GradientSurgery(SurgeryAdamW(model.parameters()), method, tasks=TASKS, max_norm=1.0)
