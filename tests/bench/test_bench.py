"""The surgery benchmark: its oracle, its refusals, and a whole run on a tiny encoder."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_recorder import OpRecorder
from torch import Tensor, nn

from fastmtl import cli
from fastmtl.bench import sizes, surgery, textbook, variants
from fastmtl.bench.oracle import GradientMismatch, Oracle
from fastmtl.bench.sizes import SEED, Shape, Size
from fastmtl.bench.variants import BUILDERS, Skipped, Variant
from fastmtl.bench.workload import Workload
from fastmtl.cuda_graphs import heads as head_graphs
from fastmtl.cuda_graphs import options as graph_options
from fastmtl.cuda_graphs.heads import HeadGraphs
from fastmtl.cuda_graphs.recorder import Unrecorded
from fastmtl.errors import UserError
from fastmtl.measure.harness import (
    GPU_STEPS,
    MIB,
    gpu_peak_bytes,
    graph_pool_bytes,
    in_own_process,
    interleave,
    summary,
)
from fastmtl.surgery.methods.order import draw_order

TINY = Shape("tiny", hidden=32, layers=2, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)


# Without variants that need a GPU; see test_recorded_variants_replay_the_textbooks_first_step.
ANYWHERE = [name for name in BUILDERS if not name.endswith("CUDA graphs")]
TORCHJD = {"torchjd", "torchjd autogram"}


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return Workload(Size(TINY))


@pytest.fixture(scope="module")
def oracle(tiny: Workload) -> Oracle:
    return Oracle(tiny)


@pytest.fixture(scope="module")
def tiny_bf16() -> Workload:
    return Workload(Size(TINY, tokens=256, precision="bf16"))


@pytest.fixture(scope="module")
def oracle_bf16(tiny_bf16: Workload) -> Oracle:
    return Oracle(tiny_bf16)


@pytest.mark.parametrize(
    ("order", "merged"),
    [([[1, 2, 0], [0, 2, 1], [0, 1, 2]], [0.5, -0.5]), ([[2, 1, 0], [0, 2, 1], [1, 0, 2]], [1.0, 0.5])],
)
def test_the_textbook_loop_by_hand(order: list[list[int]], merged: list[float]) -> None:
    """The first order gives (2, 0) -> (1, 1) -> (1, 0); (-1, 1) -> (0, 1) -> (0, 0); (0, -1) ->
    (-1/2, -1/2).

    The second order gives (2, 0) -> (1, 1); the second as before; (0, -1) -> (-1/2, -1/2) -> (0,
    -1/2).
    """
    gradients = [torch.tensor(row, dtype=torch.float64) for row in ([2.0, 0.0], [-1.0, 1.0], [0.0, -1.0])]
    assert textbook.pcgrad(gradients, torch.tensor(order)).tolist() == merged


def test_the_textbook_step_equals_float64(tiny: Workload) -> None:
    wide = copy.deepcopy(tiny.padded).double()
    names = [name for name, _ in wide.named_parameters()]
    rows, own = [], {}
    for task, batch in enumerate(tiny.padded_batches):
        labels = batch.labels if wide.kinds[task] == "classification" else batch.labels.double()
        batch = dataclasses.replace(batch, labels=labels)
        loss = wide.loss(task, wide.features(batch), batch)
        found = dict(zip(names, torch.autograd.grad(loss, list(wide.parameters()), allow_unused=True), strict=True))
        rows.append(torch.cat([found[name].flatten() for name in names if name.startswith("encoder.")]))
        own.update({name: g for name, g in found.items() if name.startswith(f"heads.{task}.")})
    torch.manual_seed(7)
    order = [torch.randperm(3).tolist() for _ in range(3)]
    merged = torch.zeros_like(rows[0])
    for i in range(3):
        row = rows[i]
        for j in order[i]:
            if j != i:
                row = row - min(float(row.dot(rows[j])), 0.0) / float(rows[j].dot(rows[j])) * rows[j]
        merged += row
    assert (merged - torch.stack(rows).sum(0)).norm() > 0.1 * merged.norm()  # some gradients conflict

    torch.manual_seed(7)
    textbook.step(tiny.padded, tiny.padded_batches)
    stepped = {name: p.grad for name, p in tiny.padded.named_parameters()}
    flat = torch.cat([stepped[name].flatten() for name in names if name.startswith("encoder.")])
    scale = sum(row.norm() for row in rows)
    assert (flat - merged).norm() < 1e-5 * scale
    for name, gradient in own.items():
        assert (stepped[name] - gradient).norm() < 1e-5 * scale


def test_both_models_run_the_same_rows(tiny: Workload) -> None:
    batch = tiny.packed_batch
    real = [b.input_ids[b.attention_mask.bool()] for b in tiny.padded_batches]
    assert torch.equal(torch.cat(real), batch.input_ids)
    types = [b.token_type_ids[b.attention_mask.bool()] for b in tiny.padded_batches]
    assert torch.equal(torch.cat(types), batch.token_type_ids)
    assert tiny.num_padded > batch.num_tokens
    with torch.no_grad():
        packed = [float(total / count) for total, count in tiny.packed(batch).values()]
        model = tiny.padded
        padded = [float(model.loss(t, model.features(b), b)) for t, b in enumerate(tiny.padded_batches)]
    assert packed == pytest.approx(padded, rel=1e-5)


def test_the_oracle_is_the_textbook_loop_in_float64(tiny: Workload, oracle: Oracle) -> None:
    rows = [row.double() for row in textbook.task_gradients(tiny.padded, tiny.padded_batches)]
    names = [name for name, _ in tiny.padded.encoder.named_parameters(prefix="encoder")]
    for seed in range(4):
        expected = oracle.expected(draw_order(3, seed, 1))
        flat = torch.cat([expected[name].flatten() for name in names])
        wanted = textbook.pcgrad(rows, draw_order(3, seed, 1))
        assert (flat - wanted).norm() < 1e-6 * wanted.norm()
    summed = torch.cat([oracle.expected(None)[name].flatten() for name in names])
    assert (summed - sum(rows)).norm() < 1e-6 * summed.norm()


@pytest.mark.parametrize("name", ANYWHERE)
def test_every_variant_passes_the_check(name: str, tiny: Workload, oracle: Oracle) -> None:
    variant = variants.build(name, tiny)
    assert oracle.check(variant) <= variant.tolerance


@pytest.mark.parametrize("name", ANYWHERE)
def test_every_variant_passes_the_check_in_bf16(name: str, tiny_bf16: Workload, oracle_bf16: Oracle) -> None:
    variant = variants.build(name, tiny_bf16)
    assert {parameter.dtype for parameter in variant.model.parameters()} == {torch.bfloat16}
    assert 1e-3 < oracle_bf16.check(variant) < 0.1  # rounding errors only


@pytest.mark.parametrize("method", ["sum", "pcgrad"])
def test_recorded_variants_replay_the_textbooks_first_step(method: str, tiny: Workload, oracle: Oracle) -> None:
    recorder = OpRecorder()
    variant = variants.recorded("recorded", tiny, method, recorder=recorder)
    recorded = len(recorder.recordings)
    assert oracle.check(variant) <= variant.tolerance
    if method == "pcgrad":  # the recording steps do not count
        second = dataclasses.replace(variant, order=draw_order(3, SEED, 2))
        assert oracle.check(second) <= variant.tolerance
    assert len(recorder.recordings) == recorded > 0  # the checked and timed step only replays
    heads = variant.model.recorded_heads
    assert isinstance(heads, HeadGraphs) and heads._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_variants_pass_the_check_in_bf16(dtype: torch.dtype, tiny_bf16: Workload, oracle_bf16: Oracle) -> None:
    variant = variants.recorded("recorded", tiny_bf16, "pcgrad", dtype, OpRecorder())
    assert 1e-3 < oracle_bf16.check(variant) < 0.1


def test_a_step_that_falls_back_is_not_measured_as_cuda_graphs(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Skipped) as found:
        variants.recorded("recorded", tiny, "pcgrad")
    reasons = str(found.value).split("; ")
    beginnings = ("gradient surgery falls back", "this forward falls back", "heads and losses fall back")
    assert [any(reason.startswith(words) for reason in reasons) for words in beginnings] == [True] * 3
    with pytest.raises(Skipped, match="need an NVIDIA GPU, the model is on cpu"):
        variants.build("pcgrad, CUDA graphs", tiny)
    monkeypatch.setattr(graph_options, "heads_unsupported_reason", lambda _: "no heads today")
    monkeypatch.setattr(head_graphs, "heads_unsupported_reason", lambda _: "no heads today")
    with pytest.raises(Skipped, match="^heads and losses fall back to eager execution: no heads today$"):
        variants.recorded(
            "recorded", tiny, "pcgrad", recorder=Unrecorded()
        )  # heads would be recorded in the second step


def test_memory_of_graphs_is_that_of_their_private_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 10},
        {"device": 0, "segment_pool_id": (0, 7), "total_size": 64, "allocated_size": 4},
        {"device": 1, "segment_pool_id": (0, 8), "total_size": 32, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert graph_pool_bytes(torch.device("cuda", 0)) == 60


def test_bf16_may_be_twice_as_far_off_as_torch_itself(tiny_bf16: Workload, oracle_bf16: Oracle) -> None:
    model, rounded = copy.deepcopy(tiny_bf16.padded).float(), tiny_bf16.padded
    name = "encoder.encoder.layer.0.intermediate.dense.weight"
    found = []
    for candidate in (model, rounded):
        rows = textbook.task_gradients(candidate, tiny_bf16.padded_batches)
        sizes = [parameter.numel() for parameter in candidate.encoder.parameters()]
        index = [f"encoder.{key}" for key, _ in candidate.encoder.named_parameters()].index(name)
        found.append(sum(row.float().split(sizes)[index] for row in rows))
    wanted = oracle_bf16.expected(None)
    assert (wanted[name].flatten() - found[0]).norm() < 1e-6 * found[0].norm()
    joint = dataclasses.replace(variants.build("autograd", tiny_bf16), tolerance=0.0)
    own = oracle_bf16._error(name, found[1].view_as(wanted[name]), wanted[name])
    allowed = oracle_bf16.allowed(joint)
    assert allowed[name] == pytest.approx(max(2 * own, min(allowed.values())), rel=1e-3)
    assert oracle_bf16.allowed(variants.build("textbook", tiny_bf16))[name] > 1e-2  # peers merge in bf16, too


def scale_a_bias(model: nn.Module) -> None:
    model.encoder.encoder.layer[0].output.LayerNorm.bias.grad.mul_(1.01)


def lose_one(model: nn.Module) -> None:
    model.encoder.embeddings.word_embeddings.weight.grad = None


def break_a_head(model: nn.Module) -> None:
    model.heads[1].dense.weight.grad.fill_(float("nan"))


def forget_a_task(model: nn.Module) -> None:
    model.encoder.encoder.layer[1].intermediate.dense.weight.grad.mul_(2 / 3)


@pytest.mark.parametrize("harm", [lose_one, break_a_head, forget_a_task])
def test_a_wrong_gradient_is_refused_in_bf16(
    harm: Callable[[nn.Module], None], tiny_bf16: Workload, oracle_bf16: Oracle
) -> None:
    right = variants.build("pcgrad stacked", tiny_bf16)

    def step() -> None:
        right.step()
        harm(right.model)

    with pytest.raises(GradientMismatch, match=r"^broken: the gradient of \S+ is not the textbook loop's"):
        oracle_bf16.check(dataclasses.replace(right, name="broken", step=step))


def test_a_sum_is_not_pcgrad_in_bf16(tiny_bf16: Workload, oracle_bf16: Oracle) -> None:
    order = variants.build("pcgrad stacked", tiny_bf16).order
    with pytest.raises(GradientMismatch, match="^sum: "):
        oracle_bf16.check(dataclasses.replace(variants.build("sum", tiny_bf16), order=order))


@pytest.mark.parametrize("harm", [scale_a_bias, lose_one, break_a_head])
def test_a_wrong_gradient_is_refused(harm: Callable[[nn.Module], None], tiny: Workload, oracle: Oracle) -> None:
    right = variants.build("pcgrad stacked", tiny)

    def step() -> None:
        right.step()
        harm(right.model)

    with pytest.raises(GradientMismatch, match=r"^broken: the gradient of \S+ is not the textbook loop's"):
        oracle.check(dataclasses.replace(right, name="broken", step=step))


def test_a_sum_and_another_order_are_not_pcgrad(tiny: Workload, oracle: Oracle) -> None:
    summed, right = variants.build("sum", tiny), variants.build("pcgrad replay", tiny)
    order = right.order
    assert order is not None
    with pytest.raises(GradientMismatch, match="^sum: "):
        oracle.check(dataclasses.replace(summed, order=order))
    found = [merged(oracle, draw_order(3, seed, 1)) for seed in range(20)]
    other = next(seed for seed, value in enumerate(found) if (value - merged(oracle, order)).norm() > 1e-2)
    with pytest.raises(GradientMismatch, match="^pcgrad replay: "):
        oracle.check(dataclasses.replace(variants.build("pcgrad replay", tiny), order=draw_order(3, other, 1)))


def merged(oracle: Oracle, order: Tensor) -> Tensor:
    return torch.cat([value.flatten() for value in oracle.expected(order).values()])


def test_nothing_is_timed_after_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = BUILDERS["autograd"]

    def wrong(name: str, workload: Workload) -> Variant:
        right = builder(name, workload)
        return dataclasses.replace(right, step=lambda: (right.step(), scale_a_bias(right.model)))

    timed: list[object] = []
    monkeypatch.setitem(BUILDERS, "autograd", wrong)
    monkeypatch.setattr(surgery, "interleave", lambda *_: timed.append(_))
    with pytest.raises(GradientMismatch, match="^autograd: "):
        surgery.bench_variants(Size(TINY), 1, quiet)
    assert not timed


def test_without_a_conflict_the_check_would_see_nothing() -> None:
    alone = Workload(Size(TINY, tasks=1))
    with pytest.raises(GradientMismatch, match="^textbook: the tasks do not conflict"):
        Oracle(alone).check(variants.build("textbook", alone))


def test_a_peer_that_cannot_run_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tiny: Workload, oracle: Oracle
) -> None:
    def fail() -> None:
        raise RuntimeError("no rule for this op\nat great length")

    ours = variants.build("autograd", tiny)
    with pytest.raises(Skipped, match="^RuntimeError: no rule for this op$"):
        oracle.check(dataclasses.replace(ours, step=fail, optional=True))
    with pytest.raises(RuntimeError, match="no rule"):  # failures of fastmtl's variants are errors
        oracle.check(dataclasses.replace(ours, step=fail))
    for module, name in (("torchjd.autojac", "torchjd"), ("torchjd.autogram", "torchjd autogram")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(Skipped, match=r"pip install 'fastmtl-torch\[torchjd\]'"):
            variants.build(name, tiny)


def test_variants_take_turns() -> None:
    order: list[str] = []
    samples = interleave({name: lambda name=name: order.append(name) for name in "ABC"}, 2, quiet)
    assert order == list("ABCABC")
    assert [len(seconds) for seconds in samples.values()] == [2, 2, 2]
    order.clear()
    samples = interleave({name: lambda name=name: order.append(name) for name in "ABC"}, 3, quiet, half_as_often="B")
    assert order == list("ABCACABC")
    assert [len(seconds) for seconds in samples.values()] == [3, 2, 3]


def test_summary_holds_median_quantiles_and_samples() -> None:
    seconds = [5.0, 1.0, 4.0, 2.0, 3.0, 100.0]
    assert summary(seconds) == {"median_s": 3.5, "p20_s": 2.0, "p80_s": 5.0, "samples_s": seconds}


@pytest.mark.slow
def test_peak_memory_is_that_of_one_variant() -> None:
    wide = dataclasses.replace(TINY, hidden=256, intermediate=1024, layers=4)
    held = torch.ones(200 * MIB // 4)  # held by this process, not by the measured ones
    joint, stacked = (
        in_own_process(surgery.peak_of, name, Size(wide), 1, preload="fastmtl.bench.surgery")
        for name in ("autograd", "pcgrad stacked")
    )
    assert joint is not None and stacked is not None
    model = Workload(Size(wide)).packed
    dense = sum(p.numel() for p in model.shared_parameters()) - sum(p.numel() for p in model.sparse_parameters())
    assert 0.8 * 12 * dense <= stacked - joint <= 2.5 * 12 * dense
    del held


def test_more_tasks_in_the_same_number_of_tokens() -> None:
    result = surgery.bench_tasks(Size(TINY, tokens=1025), 2, quiet, numbers=(2, 8))
    assert [(point["tasks"], point["tokens"]) for point in result["points"]] == [(2, 1025), (8, 1025)]
    few, many = (point["pcgrad stacked"] for point in result["points"])
    assert few["relative"] == 1.0
    assert many["relative"] == many["median_s"] / few["median_s"]


@pytest.mark.parametrize("task", range(3))
def test_lengths_are_those_of_short_texts(task: int) -> None:
    lengths = sizes.lengths_of_rows(task, 32)
    assert lengths.mean() == pytest.approx((30, 28, 25)[task], abs=0.6)
    assert lengths.max() >= 2 * lengths.mean()  # under half of a padded batch is real tokens
    assert sizes.lengths_of_tokens(task, 256).sum() == 256


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fastmtl", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    cli.app(list(arguments), standalone_mode=False)


@pytest.mark.slow
def test_the_command_prints_and_saves_ratios(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sizes.SHAPES, "minilm", TINY)
    file = tmp_path / "surgery.json"
    run(monkeypatch, "bench", "surgery", "--rounds", "2", "--json", str(file))
    printed, progress = capsys.readouterr()
    assert "0 s  building models\n" in progress and "s  round 2 of 2\n" in progress  # not on a terminal
    result = json.loads(file.read_text())
    assert set(result["variants"]) | set(result["skipped"]) == set(BUILDERS)
    assert set(BUILDERS) - set(ANYWHERE) <= set(result["skipped"]) <= set(BUILDERS) - set(ANYWHERE) | TORCHJD
    assert set(result["variants"]) >= set(ANYWHERE) - TORCHJD
    joint = min(result["variants"][name]["median_s"] for name in ("autograd", "sum"))
    loop = result["variants"]["textbook"]["median_s"]
    for name, entry in result["variants"].items():
        assert len(entry["samples_s"]) == (1 if name in {"textbook", *TORCHJD} else 2)  # peers run in every other round
        assert entry["ratio_to_joint"] == entry["median_s"] / joint
        assert entry["ratio_to_textbook"] == entry["median_s"] / loop
        assert entry["peak_mib"] > 0
        assert f"{name} " in printed and f"{entry['ratio_to_joint']:.2f}x" in printed
    assert result["variants"]["autograd"]["peak_above_joint_mib"] == 0
    assert {"device", "threads", "torch", "transformers", "fastmtl", "commit"} <= set(result["environment"])
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["kernels"]["gramian"] in ("cpp", "reference")


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "bench", "surgery", "--help")
    assert "fastmtl bench surgery --shape bert-base" in capsys.readouterr().out.split("Examples")[1]


def test_what_cannot_be_done_is_said_before_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sweep and --tasks exclude each other"):
        run(monkeypatch, "bench", "surgery", "--sweep", "--tasks", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU"):
        run(monkeypatch, "bench", "surgery", "--device", "cuda")
    with pytest.raises(UserError, match="--json: cannot write"):
        run(monkeypatch, "bench", "surgery", "--json", str(tmp_path / "no" / "file.json"))


class FakeEvent:
    """An event of a GPU whose clock advances by 5 ms per step."""

    steps = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.steps

    def synchronize(self) -> None:
        assert self.at == FakeEvent.steps  # synchronised last; otherwise only launches would be timed

    def elapsed_time(self, end: FakeEvent) -> float:
        return 5.0 * (end.at - self.at)


def test_a_time_on_a_gpu_is_the_mean_of_steps_after_one_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "steps", 0)

    def step() -> None:
        FakeEvent.steps += 1

    samples = interleave({"A": step}, 2, quiet, torch.device("cuda"))
    assert samples == {"A": [0.005, 0.005]}
    assert FakeEvent.steps == 2 * (GPU_STEPS + 1)


def test_peak_memory_of_a_gpu_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: calls.append("max") or 7)
    assert gpu_peak_bytes(lambda: calls.append("step"), torch.device("cuda")) == 7
    assert calls == ["synchronize", "reset_peak_memory_stats", "step", "synchronize", "max"]
