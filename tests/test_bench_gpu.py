"""benchmarks/bench_gpu.py, which `make gpu-check` runs on a GPU, tried on the CPU in a small size."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastmtl.bench import kernels, peers, sizes, surgery
from fastmtl.bench.bounds import SURGERY, bounds
from fastmtl.bench.harness import MIB, WrongResult
from fastmtl.bench.result_file import slug
from fastmtl.bench.sizes import Shape

FILE = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
TINY = Shape("tiny", hidden=32, layers=2, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with no compute-sanitizer on PATH, and without the minute that peaks of CPU processes take."""
    spec = importlib.util.spec_from_file_location("bench_gpu", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sizes.SHAPES, "minilm", TINY)
    monkeypatch.setattr(module, "PEER_ROWS", 4)
    monkeypatch.setattr(module, "PROFILER", [sys.executable, "-c", "import sys; print('profiled', *sys.argv[1:])"])
    monkeypatch.setattr(surgery, "in_own_process", lambda _, name, size, __: (2 + size.shape.rows) * MIB)
    monkeypatch.setattr(peers, "in_own_process", lambda _, *more: (2 + more[1].shape.rows if more[1:] else 1) * MIB)
    monkeypatch.setattr(kernels, "in_own_process", lambda function, *arguments, preload: function(*arguments))
    monkeypatch.setattr(kernels, "free_at_once", lambda: None)
    program = tmp_path / "bin" / "compute-sanitizer"
    monkeypatch.setattr(module.shutil, "which", lambda _: str(program) if program.exists() else None)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    options = "--device cpu --shape minilm --tokens 256 --rounds 1 --commit abc".split()
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *options, "--results", str(tmp_path / "results")])
    try:
        module.main()
    finally:
        (file,) = (tmp_path / "results").glob("*.json")
        result: dict[str, Any] = json.loads(file.read_text())
        assert file.stem == slug(result["environment"]["device"])
    return result


def sanitizer(tmp_path: Path, script: str) -> None:
    """A compute-sanitizer of our own, which is called with the tool's name as $2."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_the_whole_run(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("varlen_attention", "pool", "gramian", "combine")
    monkeypatch.setattr(bench_gpu.ops, "OPERATIONS", few)
    result = run(bench_gpu, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert {"device", "driver", "cuda", "torch", "triton", "kernels", "commit", "clean"} <= set(result["environment"])
    assert {"kernels", "step", "adapters", "graphs", "surgery", "peers", "bounds"} <= set(result)
    assert {name.split()[0] for name in result["kernels"]["operations"]} == set(few)
    measured = {way for case in result["kernels"]["operations"].values() for way in (*case["errors"], *case["skipped"])}
    assert "eager" in measured and "compiled" not in measured
    assert [(part["tasks"], part["tokens"], part["precision"]) for part in result["surgery"]] == [
        (3, 256, "bf16"),
        (8, 256, "bf16"),
    ]
    for bound in result["bounds"]:
        assert f"{bound['what']}: {bound['measured']:.3g}, bound" in printed
    assert f"profiled --output {tmp_path / 'results'}" in printed
    why = "not run: compute-sanitizer is not on PATH"
    assert result["compute-sanitizer"] == {"memcheck": why, "racecheck": why}
    assert result["failures"] == []
    drawn = {path.name for path in (tmp_path / "results").glob("*/*.svg")}
    assert {"roofline.svg", "kernels.svg", "step-tiny.svg", "step-adapters-tiny.svg", "peers-tiny.svg"} <= drawn


def test_a_missing_package_is_named_and_the_rest_is_measured(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("config", "bench.surgery", "bench.oracle", "bench.variants", "bench.workload"):
        monkeypatch.delitem(sys.modules, f"fastmtl.{module}")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.setattr(bench_gpu.ops, "OPERATIONS", ("pool",))
    with pytest.raises(SystemExit, match="all but the kernels is left out: .* has no pydantic$"):
        run(bench_gpu, monkeypatch, tmp_path)
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert "step" not in result and len(result["failures"]) == 1
    assert [bound["what"] for bound in result["bounds"]] == [
        "pool mean of the copy's speed",
        "pool max of the copy's speed",
    ]


def test_a_profiler_that_fails_says_why(bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bench_gpu.PROFILER_SECONDS < 540
    chosen = argparse.Namespace(commit=None)
    monkeypatch.setattr(bench_gpu, "PROFILER", [sys.executable, "-c", "import sys; sys.exit('no encoder here')"])
    assert bench_gpu._profiled(chosen, tmp_path) == ["fastmtl profile: no encoder here"]
    monkeypatch.setattr(bench_gpu, "PROFILER", [sys.executable, "-c", "import time; time.sleep(9)"])
    monkeypatch.setattr(bench_gpu, "PROFILER_SECONDS", 0.1)
    assert bench_gpu._profiled(chosen, tmp_path)[0].startswith("fastmtl profile did not end in 0.1 s")


def test_a_wrong_result_fails_and_the_rest_is_measured(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(*_: object, **__: object) -> dict[str, Any]:
        raise WrongResult("off")

    for module, name in ((surgery, "bench_variants"), (peers, "bench_peers"), (bench_gpu, "bench_kernels")):
        monkeypatch.setattr(module, name, wrong)
    names = ("kernels", "surgery, 3 tasks", "surgery, 8 tasks", "peers")
    with pytest.raises(SystemExit, match="^" + "\n".join(f"gpu-check failed: {name}: off" for name in names) + "$"):
        run(bench_gpu, monkeypatch, tmp_path)
    (file,) = (tmp_path / "results").glob("*.json")
    assert {"step", "adapters"} <= set(json.loads(file.read_text()))


def test_bounds_are_what_the_design_promises() -> None:
    def passes(**medians: float) -> dict[str, Any]:
        return {"passes": {"both": {name: {"median_s": value} for name, value in medians.items()}}, "about": "rows"}

    slow = passes(**{"fastmtl triton": 5e-5, "fastmtl reference": 9.0, "copy": 4e-5, "sdpa padded": 4e-5})
    operations = {"varlen_attention": slow, "add_layer_norm": slow, "gramian": slow, "combine": slow}
    steps = {"fastmtl sum": 1.0, "fastmtl sum, pal 204": 1.09, "fastmtl sum, low_rank 8": 1.05, "transformers": 3.0}
    found = bounds(
        {
            "kernels": {"operations": operations, "shape": {"layers": 12}},
            "adapters": {"steps": {name: {"median_s": value} for name, value in steps.items()}},
            "surgery": [
                {"shape": {"name": "x"}, "tasks": n, "tokens": 9, "variants": {SURGERY: {"ratio_to_joint": 1.1}}}
                for n in (3, 8)
            ],
        }
    )
    values = [(round(bound["measured"], 6), bound["bound"], bound["holds"]) for bound in found]
    assert values == [
        (0.1, 0.08, False),
        (0.1, 0.15, True),
        (0.8, 0.85, False),  # gramian and combine
        (0.8, 0.85, False),  # add_layer_norm
        (0.6, 0.6, True),  # ms of 12 layers
        (1.25, 1.0, False),
        (0.09, 0.10, True),
        (0.05, 0.04, False),
    ]


def test_the_small_run_under_a_clean_sanitizer(bench_gpu: ModuleType, tmp_path: Path) -> None:
    script = 'tool=$2; shift 4; [ $tool = memcheck ] && shift 2; "$@" || exit 1'
    sanitizer(tmp_path, f'{script}; echo "========= $tool SUMMARY: 0 errors"')
    assert bench_gpu.sanitized("cpu") == {"memcheck": "clean", "racecheck": "clean"}


def test_what_a_sanitizer_may_say(bench_gpu: ModuleType, tmp_path: Path) -> None:
    sanitizer(tmp_path, 'echo "========= Invalid __global__ read"; echo "========= ERROR SUMMARY: 1 error"; exit 3')
    for found in bench_gpu.sanitized("cpu").values():
        assert found == "found:\n========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error"
    assert bench_gpu.outcome(0, "== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == "clean"
    assert bench_gpu.outcome(0, "== RACECHECK SUMMARY: 2 hazards displayed").startswith("found")
    assert bench_gpu.outcome(1, "== ERROR SUMMARY: 0 errors").startswith("found")  # the run itself failed
    assert bench_gpu.outcome(0, "").startswith("found")  # no word of a summary
    assert bench_gpu.outcome(1, "== Error: Device not supported.").startswith("not run")


def test_files_are_named_after_the_device() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
