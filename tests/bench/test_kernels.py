"""The benchmark of the kernels: checks, refusals and output. benchmarks/ runs all ways."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import python_path
from torch import Tensor

from fastmtl import cli
from fastmtl.bench import kernels, laps, ops, sizes
from fastmtl.bench.laps import CpuClock, GpuClock
from fastmtl.bench.ops.case import EAGER, Case, Run, Tensors, Way, compiled
from fastmtl.bench.sizes import Size
from fastmtl.errors import UserError
from fastmtl.measure.harness import GPU_STEPS, MIB, Skipped, WrongResult, in_own_process
from fastmtl.measure.heap import free_at_once
from fastmtl_kernels import __all__ as names

SIZE = Size(ops.TINY, dropout=0.1)
ROOT = Path(__file__).parents[2]


def case_of(operation: str, size: Size = SIZE) -> Case:
    return ops.cases(operation, size)[0]


def test_every_operation_has_a_benchmark() -> None:
    others = {"Implementation", "implementations", "add_layer_norm_with_sum"}
    assert set(names) - others <= set(ops.OPERATIONS)
    assert {f"bench_{operation}.py" for operation in ops.OPERATIONS} <= {p.name for p in ROOT.glob("benchmarks/*.py")}
    assert sizes.SHAPES["bert-base"].parameters == 108_891_648  # transformers' BertModel without its pooler


@pytest.mark.parametrize("harm", ["output", "gradient"])
@pytest.mark.parametrize("operation", ["add_layer_norm", "varlen_attention", "low_rank"])
def test_a_wrong_result_is_not_timed(operation: str, harm: str) -> None:
    case = case_of(operation)
    right = case.way("fastmtl reference")

    def build() -> Run:
        run = right.build()

        def wrong(tensors: Tensors, dropout: float) -> Tensor:
            result = run(tensors, dropout)
            if harm == "output":
                return result * 1.0001
            first = tensors[case.wanted[0]].sum()
            return result + (first - first.detach())

        return wrong

    ours = dataclasses.replace(case, ways=[Way("fastmtl reference", build, ours=True)])
    with pytest.raises(
        WrongResult, match=f"^{operation}, fastmtl reference: the {harm}.* is off by .* so it is not timed$"
    ):
        kernels.runnable(ours)
    if harm == "output":
        return  # within the rounding error of a peer
    peer = dataclasses.replace(case, ways=[Way("peer", build)])
    _, _, skipped = kernels.runnable(peer)
    assert skipped["peer"].startswith(f"{operation}, peer: the gradient of {case.wanted[0]} is off by ")


def test_peers_that_cannot_run_are_left_out_with_the_reason() -> None:
    def missing() -> Run:
        raise Skipped("no such package")

    def failing(_: Tensors, __: float) -> Tensor:
        raise NotImplementedError("no rule for this\nat great length")

    case = dataclasses.replace(case_of("pool"), ways=[Way("one", missing), Way("two", lambda: failing)])
    assert kernels.runnable(case) == (
        {},
        {},
        {"one": "no such package", "two": "NotImplementedError: no rule for this"},
    )
    with pytest.raises(NotImplementedError):  # failures of fastmtl's implementations are errors
        kernels.runnable(dataclasses.replace(case, ways=[Way("two", lambda: failing, ours=True)]))


def test_bf16_inputs_are_bf16_and_pass() -> None:
    for operation in ("add_layer_norm", "varlen_attention", "gramian"):
        case = case_of(operation, dataclasses.replace(SIZE, precision="bf16"))
        assert {tensor.dtype for tensor in case.tensors.values()} == {torch.bfloat16}
        found, errors, _ = kernels.runnable(case, ["fastmtl", EAGER])
        assert EAGER in found and max(errors.values()) <= 1


def test_a_peer_may_be_more_exact() -> None:
    found, errors, skipped = kernels.runnable(case_of("gramian"), ["eager in float64"])
    assert "eager in float64" in found and errors["eager in float64"] <= 1 and not skipped


@pytest.mark.slow
def test_torch_compile_is_one_of_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = case_of("low_rank")
    eager = case.way(EAGER)
    way = Way("compiled", lambda: compiled(eager.build()))
    assert case.check(way, way.build()) <= 1


def test_on_a_cpu_short_steps_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(laps.time, "perf_counter", lambda: now[0])
    order = []

    def link(name: str, took: float, value: object) -> str:
        now[0] += took
        order.append((name, value))
        return name

    found = CpuClock().laps([partial(link, "forward", 0.001), partial(link, "backward", 0.003)])
    assert found == pytest.approx([0.001, 0.003])
    assert order == [("forward", None), ("backward", "forward")] * 3


class FakeGpu:
    """A GPU clock: reading a buffer takes 2 ms, a link of the chain 5 ms."""

    now_ms = 0.0
    swept = 0


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeGpu.now_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_on_a_gpu_the_cache_is_emptied_and_the_host_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffer:
        def zero_(self) -> None:
            pytest.fail("written lines go to memory while the next link is timed")

    def read(buffer: object, dim: int, *, out: object) -> None:
        assert isinstance(buffer, Buffer) and dim == 0 and not isinstance(out, Buffer)
        FakeGpu.now_ms += 2
        FakeGpu.swept += 1

    def zeros(size: object, **_: Any) -> object:
        return Buffer() if size == 100 * MIB // 4 else object() if size == () else pytest.fail("size")

    host = [0.0]
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"L2_cache_size": 50 * MIB}))
    monkeypatch.setattr(laps.torch, "zeros", zeros)
    monkeypatch.setattr(laps.torch, "sum", read)
    monkeypatch.setattr(laps.time, "perf_counter", lambda: host[0])
    clock = GpuClock(torch.device("cuda"))

    def link(value: object) -> str:
        FakeGpu.now_ms += 5
        host[0] += 0.004  # launch time: two thirds of three sweeps
        return "value"

    FakeGpu.swept = 0
    assert clock.laps([link, link]) == pytest.approx([0.005, 0.005])
    assert FakeGpu.swept == GPU_STEPS * 2 * 3


def command(*arguments: str) -> None:
    cli.app(["bench", *arguments], standalone_mode=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command on a tiny size, without a separate process for the peaks."""
    monkeypatch.setitem(sizes.SHAPES, "minilm", ops.TINY)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(kernels, "in_own_process", lambda function, *arguments, preload: function(*arguments))
    monkeypatch.setattr(kernels, "free_at_once", lambda: None)


def measure(tmp_path: Path, *more: str) -> dict[str, Any]:
    file = tmp_path / "kernels.json"
    options = ("--op", "pool", "--op", "pcgrad_weights", "--impl", "fastmtl", "--impl", "eager", "--rounds", "3")
    command("kernels", *options, "--json", str(file), *more)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.usefixtures("small")
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measure(tmp_path, "--plot", str(tmp_path / "plots"), "--commit", "abc")
    printed = capsys.readouterr().out
    assert set(result["operations"]) == {"pool cls", "pool mean", "pool max", "pcgrad_weights"}
    mean = result["operations"]["pool mean"]
    assert set(mean["passes"]) == {"forward", "backward", "both"}
    assert mean["skipped"]["fastmtl triton"] == "the Triton kernels take CUDA tensors, not cpu"
    ways = mean["passes"]["both"]
    assert {"fastmtl reference", "eager", "copy"} <= set(ways) and "padded" not in ways
    for link, moved in mean["work"].items():
        for entry in mean["passes"][link].values():
            assert len(entry["samples_s"]) == 3 and entry["p20_s"] <= entry["median_s"] <= entry["p80_s"]
            assert entry["gb_per_s"] == pytest.approx(moved["bytes"] / entry["median_s"] / 1e9)
            assert entry["share_of_copy"] == mean["passes"][link]["copy"]["median_s"] / entry["median_s"]
            assert entry["tokens_per_s"] == mean["tokens"] / entry["median_s"]
            assert entry["ratio_to_eager"] == entry["median_s"] / mean["passes"][link]["eager"]["median_s"]
    eager = ways["eager"]
    assert eager["share_of_gemm"] == pytest.approx(eager["tflop_per_s"] / result["gemm"]["tflop_per_s"])
    assert mean["work"]["both"]["bytes"] == sum(mean["work"][link]["bytes"] for link in ("forward", "backward"))
    assert set(mean["peak_mib"]) == set(ways) - {"copy"}
    assert "pool mean: 325 tokens in 12 sequences" in printed and f"{1e3 * eager['median_s']:.3f}" in printed
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"roofline.svg", "kernels.svg"}


@pytest.mark.usefixtures("small")
def test_names_that_are_none() -> None:
    with pytest.raises(UserError, match="unknown operation 'poll'. Did you mean 'pool'?"):
        command("kernels", "--op", "poll")
    with pytest.raises(UserError, match="unknown implementation 'eagr'. Did you mean 'eager'?"):
        command("kernels", "--op", "pool", "--impl", "eagr")


def test_a_copy_moves_as_many_bytes() -> None:
    case = case_of("add_layer_norm")
    for link, copy in zip(case.passes, kernels._copies(case), strict=True):
        assert copy(None).nbytes * 2 == case.work[link].bytes


@pytest.mark.slow
def test_peak_memory_is_that_of_the_pass() -> None:
    """Measure in a separate process, like the command: here malloc may hold freed memory."""
    peak = in_own_process(peak_of_known_size, preload="fastmtl.bench.kernels")
    assert peak is not None and 127 * MIB <= peak <= 150 * MIB


def peak_of_known_size() -> int | None:
    def forward(_: object) -> Tensor:
        return torch.ones(64 * MIB // 4)

    free_at_once()
    return kernels._peak([forward, lambda value: (value * 2).sum()], torch.device("cpu"))


@pytest.mark.slow
def test_pytest_benchmark_repeats_groups_and_keeps(tmp_path: Path) -> None:
    """The times of pytest-benchmark are those of the harness's clock."""
    file = tmp_path / "kept.json"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--bench-rounds", "3", f"--benchmark-json={file}")
    chosen = ("benchmarks/bench_pcgrad_weights.py", "-k", "fastmtl or eager")
    # An environment as in a shell: pytest-benchmark measures nothing if xdist's worker variable is
    # set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = python_path()
    run = [sys.executable, "-m", "pytest", *options, *chosen]
    ran = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kept = json.loads(file.read_text())["benchmarks"]
    assert {(entry["group"], entry["name"]) for entry in kept} == {
        ("pcgrad_weights, forward", f"test_pcgrad_weights[pcgrad_weights-{way}-forward]")
        for way in ("fastmtl reference", "eager")
    }
    assert all(1e-5 < entry["stats"]["median"] < 1 and entry["stats"]["rounds"] == 3 for entry in kept)
