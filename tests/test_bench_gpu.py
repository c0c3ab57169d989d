"""benchmarks/bench_gpu.py, which `make gpu-check` runs on a GPU, tried on the CPU in a small size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastmtl.bench import sizes, surgery
from fastmtl.bench.environment import slug
from fastmtl.bench.oracle import GradientMismatch
from fastmtl.bench.sizes import Shape, Size

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
    monkeypatch.setattr(surgery, "in_own_process", lambda *_: 1)
    program = tmp_path / "bin" / "compute-sanitizer"
    monkeypatch.setattr(module.shutil, "which", lambda _: str(program) if program.exists() else None)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    options = "--device cpu --shape minilm --tokens 1024 --columns 3001 --rounds 2".split()
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
    result = run(bench_gpu, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert {"device", "driver", "cuda", "torch", "triton", "kernels", "commit", "clean"} <= set(result["environment"])
    assert result["gradients"]["columns"] == 3001 and set(result["gradients"]["dtypes"]) == {"fp32", "bf16"}
    assert [(part["tasks"], part["tokens"], part["precision"]) for part in result["surgery"]] == [
        (3, 1024, "bf16"),
        (8, 1024, "bf16"),
    ]
    overheads = [part["variants"]["pcgrad stacked bf16"]["ratio_to_joint"] - 1 for part in result["surgery"]]
    impl = result["environment"]["kernels"]["gramian"]
    shares = [part["both"][impl]["share_of_copy"] for part in result["gradients"]["dtypes"].values()]
    assert [bound["measured"] for bound in result["bounds"]] == [*overheads, *shares]
    assert [bound["bound"] for bound in result["bounds"]] == [0.08, 0.15, 0.85, 0.85]
    holding = [overheads[0] <= 0.08, overheads[1] <= 0.15, *(share >= 0.85 for share in shares)]
    for bound, holds in zip(result["bounds"], holding, strict=True):
        assert bound["holds"] is holds
        assert f"{bound['what']}: {bound['measured']:.1%}" in printed
    why = "not run: compute-sanitizer is not on PATH"
    assert result["compute-sanitizer"] == {"memcheck": why, "racecheck": why}
    assert result["failures"] == []


def test_a_missing_package_is_named_and_the_rest_is_measured(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("config", "bench.surgery", "bench.oracle", "bench.variants", "bench.workload"):
        monkeypatch.delitem(sys.modules, f"fastmtl.{module}")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(SystemExit, match="the surgery benchmark is left out: .* has no pydantic$"):
        run(bench_gpu, monkeypatch, tmp_path)
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert result["surgery"] == [] and len(result["failures"]) == 1
    assert [bound["bound"] for bound in result["bounds"]] == [0.85, 0.85]


def test_a_wrong_gradient_fails_and_the_rest_is_measured(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(size: Size, *_: object, **__: object) -> dict[str, Any]:
        raise GradientMismatch(f"sum: {size.tasks}")

    monkeypatch.setattr(surgery, "bench_variants", wrong)
    expected = "^gpu-check failed: surgery with 3 tasks: sum: 3\ngpu-check failed: surgery with 8 tasks: sum: 8$"
    with pytest.raises(SystemExit, match=expected):
        run(bench_gpu, monkeypatch, tmp_path)


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
