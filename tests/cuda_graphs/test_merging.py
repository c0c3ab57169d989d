"""Recorded Gramian, weights and merging, by a recorder of operators instead of CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import deepspeed_cases as cases
import pytest
import torch
from op_recorder import OpRecorder
from torch import Tensor
from written_rows import make_parameters, steps_of

from fastmtl.cuda_graphs import merging as recorded_step
from fastmtl.cuda_graphs.buffers import tables as static_tables
from fastmtl.cuda_graphs.merging import RecordedStep, record_merging
from fastmtl.cuda_graphs.recorder import Recorder, Recordings, Unrecorded
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.engine.build import build_surgery
from fastmtl.errors import UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery, SurgeryAdamW, SurgeryInfo, gradient_surgery
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.methods.table import find_method
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.targets.optimizer import OptimizerTarget
from fastmtl_kernels._native import why_unavailable

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable() or "built")

TASKS = ["kind", "same", "degree"]
COUNTS = {"kind": 8, "same": 3, "degree": 8}
LossFn = Callable[[PackedBatch, object], dict[str, tuple[Tensor, int]]]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small steps of row numbers, so that small batches need several recordings."""
    monkeypatch.setattr(static_tables, "STEP", 16)


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return cases.make_model(cases.make_recipe(cases.Case(1, 1, "pcgrad", variant="graphs")))


def batches_of(step: int, part: int = 0, parts: int = 1) -> PackedBatch:
    return cases.step_batches(cases.make_data(), step, part, parts)


# One batch, accumulation, and an absent task, with several numbers of rows.
STEPS = [
    [batches_of(0, 1, 4)],
    [batches_of(1)],
    [batches_of(2, part, 4) for part in range(4)],
    [batches_of(0, 1, 2)],
    [batches_of(0)],
]


def surgery_of(model: MultiTaskModel, recorder: Recorder | None = None, **options: Any) -> GradientSurgery:
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1),
        tasks=TASKS,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        task_weights=model.task_weights,
        seed=3,
        **options,
    )
    if recorder is not None:
        surgery.record_with(partial(record_merging, recorder=recorder))
    return surgery


def run(
    surgery: GradientSurgery, model: MultiTaskModel, batches: Sequence[PackedBatch], loss_fn: LossFn | None = None
) -> tuple[SurgeryInfo, list[Tensor]]:
    """Return the report of a step and the gradients that it leaves."""
    model.zero_grad()

    def losses(batch: PackedBatch, task_grads: object) -> dict[str, tuple[Tensor, int]]:
        return model(batch, task_grads) if loss_fn is None else loss_fn(batch, task_grads)

    info = surgery.run(batches, losses, COUNTS if len(batches) > 1 else None)
    return info, [p.grad for p in model.parameters() if p.grad is not None]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare within the rounding of sums in another order."""
    assert len(found) == len(expected) > 0
    total = torch.cat([value.flatten() for value in expected]).norm()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 2e-6 * total


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "dtype"), [("pcgrad", torch.float32), ("pcgrad", torch.bfloat16), ("gradvac", torch.float32)]
)
def test_replays_equal_the_operations_bit_for_bit(method: str, dtype: torch.dtype, model: MultiTaskModel) -> None:
    """They equal the unrecorded step within rounding, in gradients and reports."""
    recorder = OpRecorder()
    ways = [surgery_of(model, each, method=method, dtype=dtype) for each in (recorder, Unrecorded(), None)]
    replayed = 0
    for batches in STEPS:
        (info, found), (eager_info, eager), (plain_info, plain) = (run(way, model, batches) for way in ways)
        assert_same(found, eager)
        assert_close(found, plain)
        assert info.losses == eager_info.losses == plain_info.losses and info.nbytes == plain_info.nbytes
        for name in ("cosines", "task_norms", "weights"):
            one, other, ordinary = (getattr(each, name).nan_to_num() for each in (info, eager_info, plain_info))
            assert torch.equal(one, other)
            assert (one - ordinary).abs().max() <= 1e-5 * ordinary.abs().max()
        assert info.merged_norm == eager_info.merged_norm
        assert info.conflict_rate == plain_info.conflict_rate
        assert recorder.replayed > replayed
        replayed = recorder.replayed
    assert info.weights is not None and (info.weights != 1).any()  # some gradients conflict
    assert 2 <= len(recorder.recordings) < len(STEPS)
    assert ways[0].state_dict() == ways[1].state_dict()
    states = [way.state_dict()["method_state"].get("targets", {"all": [[0.0]]})["all"] for way in ways]
    assert (torch.tensor(states[0]) - torch.tensor(states[2])).abs().max() <= 1e-6


def test_numbers_from_the_host_do_not_go_unnoticed(model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = recorded_step._Buffers.numbers

    def baked(buffers: recorded_step._Buffers) -> Any:
        scale, factor, order, bounds = right(buffers)
        return scale, factor, order, [torch.tensor(each.tolist()) for each in bounds]

    monkeypatch.setattr(recorded_step._Buffers, "numbers", baked)
    ways = [surgery_of(model, each) for each in (OpRecorder(), Unrecorded())]
    for batches in STEPS[1:3]:
        (_, found), (_, eager) = (run(way, model, batches) for way in ways)
    assert not all(torch.equal(*pair) for pair in zip(found, eager, strict=True))


def test_gradients_are_not_overwritten_by_the_next_step(model: MultiTaskModel) -> None:
    """A caller may keep the gradients of the previous step; those in `.grad` accumulate."""
    surgery, plain = surgery_of(model, OpRecorder()), surgery_of(model)
    expected = [[gradient.clone() for gradient in run(plain, model, batches)[1]] for batches in STEPS[:2]]
    _, first = run(surgery, model, STEPS[0])
    kept = [gradient.clone() for gradient in first]
    _, second = run(surgery, model, STEPS[1])
    assert_same(first, kept)
    assert_close(first, expected[0])
    assert_close(second, expected[1])
    surgery.run(STEPS[0], lambda batch, task_grads: model(batch, task_grads))
    summed = [one + other for one, other in zip(*expected, strict=True)]
    assert not all(torch.equal(*pair) for pair in zip(kept, second, strict=True))
    assert_close([p.grad for p in model.parameters() if p.grad is not None], summed)


def test_16_bit_gradients_are_not_overwritten_either(model: MultiTaskModel) -> None:
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    surgery = surgery_of(narrow, OpRecorder())
    _, first = run(surgery, narrow, STEPS[0])
    kept = [gradient.clone() for gradient in first]
    run(surgery, narrow, STEPS[1])
    assert {gradient.dtype for gradient in first} == {torch.bfloat16}
    assert_same(first, kept)


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_a_gradient_that_is_not_finite_skips_the_step(method: str, model: MultiTaskModel) -> None:
    def broken(batch: PackedBatch, task_grads: object) -> dict[str, tuple[Tensor, int]]:
        losses = model(batch, task_grads)
        loss, rows = losses["degree"]
        return {**losses, "degree": (loss * float("nan"), rows)}

    ways = [surgery_of(model, each, method=method) for each in (OpRecorder(), None)]
    for surgery in ways:
        run(surgery, model, STEPS[1])
        before = surgery.state_dict()["method_state"]
        info, handed_over = run(surgery, model, STEPS[1], broken)
        assert info.skipped == "degree" and not handed_over
        assert surgery.state_dict()["skipped"] == 1
        assert surgery.state_dict()["method_state"] == before
    (_, found), (_, plain) = (run(way, model, STEPS[1]) for way in ways)
    assert_close(found, plain)


class _BacksOff(OptimizerTarget):
    """A target like fp16 under DeepSpeed: the loss scale changes, and it handles overflows."""

    scale = 1024.0

    def loss_scale(self) -> float:
        return self.scale

    def backs_off(self) -> bool:
        return True


def test_a_loss_scale_that_changes(model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(surgery_of(model), model, STEPS[0])[1]
    monkeypatch.setattr(gradient_surgery, "find_target", _BacksOff)
    surgery = surgery_of(model, OpRecorder())
    for scale in (1024.0, 256.0):
        monkeypatch.setattr(_BacksOff, "scale", scale)
        assert_close(run(surgery, model, STEPS[0])[1], expected)
    monkeypatch.setattr(_BacksOff, "scale", 2.0**100)  # every gradient is finite, its square is not
    info, found = run(surgery, model, STEPS[0])
    assert info.skipped is None and info.weights is None
    shared = {id(p) for p in model.shared_parameters()}
    assert all(p.grad.isnan().all() for p in model.parameters() if id(p) in shared and p.grad is not None)
    monkeypatch.setattr(_BacksOff, "scale", 256.0)
    assert_close(run(surgery, model, STEPS[0])[1], expected)


def test_a_state_that_is_loaded_is_the_recordings(model: MultiTaskModel) -> None:
    options = {"method": "gradvac", "options": {"beta": 0.9}}
    recorded, plain = (surgery_of(model, each, **options) for each in (OpRecorder(), None))
    empty = recorded.state_dict()
    run(recorded, model, STEPS[1])
    early = recorded.state_dict()
    found = [gradient.clone() for gradient in run(recorded, model, STEPS[1])[1]]
    for state, expected in ((early, found), (empty, None)):
        recorded.load_state_dict(state)
        plain.load_state_dict(state)
        (_, again), (_, ordinary) = (run(each, model, STEPS[1]) for each in (recorded, plain))
        assert_close(again, ordinary)
        one, other = (torch.tensor(each.state_dict()["method_state"]["targets"]["all"]) for each in (recorded, plain))
        assert (one - other).abs().max() <= 1e-6
        if expected is not None:
            assert_same(again, expected)


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_any_rows_of_any_tables(num_tasks: int) -> None:
    parameters = make_parameters()
    sink = StackSink(parameters, num_tasks, sparse=parameters[1:])
    method = find_method("pcgrad")
    assert method is not None
    recorder = OpRecorder()
    step = RecordedStep(sink, method, num_tasks, torch.device("cpu"), Recordings(recorder))
    for number in steps_of([sink], parameters):
        order = draw_order(num_tasks, 0, number)
        step.run(order, 1.0, 2.0)
        expected = sink.gramian()
        assert (step.gram - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        weights = method.weights(expected, order)
        assert (step.weights - weights).abs().max() <= 1e-5
        found, merged = step.gradients(), sink.combine(2 * weights)
        assert found.keys() == merged.keys() == {id(parameter) for parameter in parameters}
        for key, value in merged.items():
            assert found[key].shape == value.shape and (found[key] - value).abs().max() <= 1e-4
    assert recorder.replayed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"storage": "kept"}, "store no J"),
        ({"storage": "replay"}, "store no J"),
        ({"scope": "tensor"}, "store no J"),
        ({"reduce": "sketch"}, "sketches"),
        ({"method": "upgrad"}, "on the host"),
        ({}, "need an NVIDIA GPU, the model is on cpu"),
        ({"method": "sum"}, None),
    ],
)
def test_reasons_are_warned(
    options: dict[str, Any], reason: str | None, model: MultiTaskModel, caplog: pytest.LogCaptureFixture
) -> None:
    surgery = surgery_of(model, **options, cuda_graphs=record_merging)
    lines = [record.message for record in caplog.records]
    assert len(lines) == (reason is not None) and all("falls back to eager execution" in line for line in lines)
    assert reason is None or reason in lines[0]
    (_, found), (_, plain) = (run(each, model, STEPS[1]) for each in (surgery, surgery_of(model, **options)))
    assert_same(found, plain)


def test_true_names_the_function_to_pass(model: MultiTaskModel) -> None:
    with pytest.raises(UserError, match="pass cuda_graphs=fastmtl.cuda_graphs.record_merging"):
        surgery_of(model, cuda_graphs=True)


def test_a_recipe_asks_for_it(model: MultiTaskModel, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for asked in (False, True):
        recipe = model.recipe.model_copy(deep=True)
        recipe.engine.cuda_graphs = asked
        build_surgery(recipe, optimizer, model)
        assert ("gradient surgery falls back to eager execution: CUDA graphs need" in caplog.text) == asked


def test_an_optimizer_that_merges_itself_does_so(model: MultiTaskModel, caplog: pytest.LogCaptureFixture) -> None:
    trained = copy.deepcopy(model)
    optimizer = SurgeryAdamW(trained.parameters())
    surgery = GradientSurgery(optimizer, tasks=TASKS, shared=trained.shared_parameters(), cuda_graphs=record_merging)
    assert "SurgeryAdamW merges task gradients itself" in caplog.text
    _, handed_over = run(surgery, trained, STEPS[1])
    assert not handed_over
    optimizer.step()


def test_what_cannot_be_recorded_is_launched(model: MultiTaskModel, caplog: pytest.LogCaptureFixture) -> None:
    class Refuses(Unrecorded):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    surgery, plain = surgery_of(model, Refuses(), method="gradvac"), surgery_of(model, method="gradvac")
    for batches in STEPS[:2]:
        (_, found), (_, expected) = (run(each, model, batches) for each in (surgery, plain))
        assert_close(found, expected)
    assert caplog.text.count("recording failed, each operation is launched separately") == 1
