"""`make gpu-check` on the CPU: real parts in a tiny size, and parts that fail, hang and crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer

from fastmtl import cli
from fastmtl.bench import ops
from fastmtl.bench.bounds import RECORDED_JOINT, RECORDED_SURGERY, SURGERY, bounds
from fastmtl.bench.gpu_check import __main__ as gpu_check
from fastmtl.bench.gpu_check import parts, process, sanitizer
from fastmtl.bench.gpu_check.parts import FASTMTL, Part, Settings
from fastmtl.measure.result_file import UNFINISHED, slug

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--shape", "tiny", "--tokens", "1024", "--rounds", "1", "--commit", "abc")
ENVIRONMENT = {"device": "A GPU", "driver": "1", "torch": "2", "triton": "3", "fastmtl": "0", "commit": "abc"}


def whole(folder: Path, *names: str, hidden: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
    """Run the command in a process with hidden modules and these parts.

    Return its exit status, output and result.
    """
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fastmtl.bench.gpu_check", *TINY, "--results", str(folder), "--parts", *names]
    run = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (file,) = folder.glob("*.json")
    result = json.loads(file.read_text())
    assert file.stem == slug(result["environment"]["device"])
    return run.returncode, run.stdout, result


@pytest.mark.slow(38)
def test_real_parts_on_the_cpu(tmp_path: Path) -> None:
    status, printed, result = whole(tmp_path, "step", "engine-short", "memcheck")
    assert status == 0, printed
    assert {"device", "driver", "cuda", "torch", "triton", "kernels", "commit", "clean"} <= set(result["environment"])
    assert {name: entry["state"] for name, entry in result["parts"].items()} == dict.fromkeys(
        ["step", "engine-short", "memcheck"], "ok"
    )
    assert set(result["step"]["steps"]) == {"transformers", "fastmtl sum", "fastmtl pcgrad", "matrix products"}
    (engine,) = result["engine"]
    assert set(engine["ways"]) == {"sum", "pcgrad", "sum, flat", "pcgrad, flat", "pcgrad, DeepSpeed's checks"}
    assert all("NVIDIA GPU" in why for why in engine["skipped"].values()) and len(engine["skipped"]) == 4
    assert result["compute-sanitizer"]["memcheck"].startswith(("not run", "clean"))
    (bound,) = result["bounds"]
    assert f"{bound['what']}: {bound['measured']:.3g}, bound 4" in printed
    pictures = {path.name for path in tmp_path.glob("*/*.svg")}
    assert {"step-tiny.svg", f"engine-3-tasks-{engine['tokens']}-tokens-tiny.svg"} <= pictures

    # Without pydantic, kernels and their tests still run, and are added to the existing result.
    names = ("surgery", "kernels-pool", "tests-kernels-api")
    status, printed, result = whole(tmp_path, *names, hidden=("pydantic",))
    assert status == 0, printed
    for name in ("surgery-3", "surgery-8", "surgery-long"):
        assert result["parts"][name]["state"] == "left out"
        assert f"left out: {name}: {sys.executable} has no pydantic" in printed
    assert {"step", "engine", "kernels"} <= set(result)
    assert set(result["kernels"]["operations"]) == {"pool cls", "pool mean", "pool max"}
    measured = {way for case in result["kernels"]["operations"].values() for way in (*case["errors"], *case["skipped"])}
    assert "eager" in measured and "compiled" not in measured
    assert result["parts"]["tests-kernels-api"]["state"] == "ok"
    tests = result["tests"]["tests-kernels-api"]
    assert sum(tests["skipped"].values()) > 0 and tests["failed"] == {}


def test_the_command_lines_of_all_parts_are_valid() -> None:
    settings = Settings(ROOT, Path("run"), commit="abc")
    table = parts.table(settings)
    assert len({part.name for part in table}) == len(table)
    for part in table:
        if part.command[:2] == FASTMTL:
            context, arguments = None, list(part.command[2:])
            command: Any = typer.main.get_command(cli.app)
            while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
                context = command.make_context("fastmtl", arguments, parent=context)
                _, command, arguments = command.resolve_command(context, arguments)
            found = command.make_context("fastmtl", arguments, parent=context).params
            assert found["commit"] == "abc"
        elif "pytest" in part.command:
            assert (ROOT / part.command[-1]).is_file()
    assert set(parts.OPERATIONS) == set(ops.OPERATIONS)
    tests = {part.command[-1] for part in table if part.key == "tests"}
    assert tests == set(parts.gpu_tests(ROOT)) >= set(parts.CAPTURES)
    tokens = {
        part.name: part.command[part.command.index("--tokens") + 1] for part in table if "--tokens" in part.command
    }
    assert (tokens["step"], tokens["surgery-long"], tokens["engine-short"]) == ("8192", "32768", "800")


def test_what_supervises_imports_nothing_that_can_kill_it() -> None:
    code = "import sys, fastmtl.bench.gpu_check.__main__; print(*sys.modules)"
    env = process.environment(ROOT)
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert not {"torch", "triton", "fastmtl_kernels", "pydantic", "numpy"} & set(found.stdout.split())


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Replace the table by parts that run lines of Python; `out` there is the result's file."""
    found: dict[str, str] = {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def part(name: str, code: str, settings: Settings) -> Part:
        result = settings.run / f"{name}.json"
        code = f"import json, os, sys, time\nout = open({str(result)!r}, 'w')\n{code}"
        needs = ("no_such_module",) if name == "needy" else ()
        limit = 2 if name == "hangs" else 30
        return Part(name, name, ("-c", code), 3, limit, result, needs)

    monkeypatch.setattr(parts, "table", lambda settings: [part(*entry, settings) for entry in found.items()])
    code = f"json.dump({ENVIRONMENT!r}, out)"
    monkeypatch.setattr(parts, "environment", lambda settings: part("environment", code, settings))
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = gpu_check.main(["--results", str(tmp_path), *options])
    return status, json.loads((tmp_path / "a-gpu.json").read_text())


@pytest.mark.slow
def test_no_part_costs_another_its_result(
    scripts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    scripts["fails"] = "print('CompilationError: of a kernel'); sys.exit(1)"
    scripts["hangs"] = (
        f"json.dump({{'found': 1, {UNFINISHED!r}: True}}, out); out.flush()\n"
        f"import subprocess; print('so far', flush=True)\n"
        f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "time.sleep(60)"
    )
    scripts["crashes"] = "os.abort()"
    scripts["silent"] = "out.close(); os.remove(out.name)"
    scripts["needy"] = "json.dump({'found': 2}, out)"
    scripts["last"] = "json.dump({'found': 3}, out)"
    begun = time.monotonic()
    status, result = run(tmp_path)
    assert time.monotonic() - begun < 25
    printed, errors = capsys.readouterr()
    assert status == 1
    states = {name: (entry["state"], entry["why"]) for name, entry in result["parts"].items()}
    assert states == {
        "fails": ("failed", "exit status 1"),
        "hangs": ("timed out", "killed at its limit of 2 s"),
        "crashes": ("failed", "killed by SIGABRT"),
        "silent": ("failed", "the part did not write silent.json"),
        "needy": ("left out", f"{sys.executable} has no no_such_module"),
        "last": ("ok", ""),
    }
    assert result["parts"]["fails"]["tail"] == "CompilationError: of a kernel" and "CompilationError" in printed
    assert result["hangs"] == {"found": 1} and result["parts"]["hangs"]["partial"]
    assert result["last"] == {"found": 3} and not result["parts"]["last"]["partial"]
    assert "fails" not in result
    assert [line.split(":")[1].strip() for line in errors.strip().splitlines()] == [
        "fails",
        "hangs",
        "crashes",
        "silent",
    ]
    assert (tmp_path / "run" / "hangs.log").read_text() == "so far\n"
    with pytest.raises(ProcessLookupError):  # its whole process group was killed
        for _ in range(100):
            os.kill(int(child.read_text()), 0)
            time.sleep(0.02)


@pytest.mark.slow
def test_what_does_not_fit_into_the_seconds_is_named(
    scripts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> float:
        """Return the time, an hour later once the first part has begun."""
        return time.monotonic() + 3600 * (tmp_path / "run" / "first.json").exists()

    scripts["first"] = "json.dump({'found': 1}, out)"
    scripts["second"] = "json.dump({'found': 2}, out)"
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=clock))
    status, result = run(tmp_path, "--seconds", str(gpu_check.RESERVE_S + 600))
    assert status == 0 and "second" not in result and result["first"] == {"found": 1}
    why = result["parts"]["second"]["why"]
    assert why.startswith("--seconds leaves ") and why.endswith(" s, the part needs about 3 s")
    assert "left out: second: " in capsys.readouterr().out
    status, result = run(tmp_path, "--parts", "second")  # a second call adds to the first one's result
    assert status == 0 and result["first"] == {"found": 1} and result["second"] == {"found": 2}
    status, result = run(tmp_path, "--list")
    assert status == 0 and "about   3 s" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--parts: there is no part 'third'"):
        run(tmp_path, "--parts", "third")


def test_an_interrupted_run_keeps_what_it_has(scripts: dict[str, str], tmp_path: Path) -> None:
    scripts["first"] = "json.dump({'found': 1}, out)"
    scripts["long"] = f"json.dump({{'found': 2, {UNFINISHED!r}: True}}, out); out.flush(); time.sleep(60)"
    scripts["never"] = "json.dump({'found': 3}, out)"

    def interrupt() -> None:
        file = tmp_path / "run" / "long.json"
        while not (file.exists() and file.stat().st_size):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, result = run(tmp_path)
    thread.join()
    assert status == 1 and result["first"] == {"found": 1} and result["long"] == {"found": 2}
    assert result["parts"]["long"]["state"] == "interrupted" and "never" not in result["parts"]


def test_outcomes_of_tests_are_kept_as_they_come(tmp_path: Path) -> None:
    file, kept = tmp_path / "test_some.py", tmp_path / "outcomes.json"
    file.write_text(
        "import os, pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('not here')\ndef test_d(): os.abort()\n"
    )
    command = ["-m", "pytest", "-q", "-p", "fastmtl.bench.gpu_check.outcomes", "--outcomes", str(kept)]
    command += ["-p", "no:xdist", "-c", os.devnull, "--rootdir", str(tmp_path), str(file)]
    outcome = process.run(command, 60, tmp_path / "log", ROOT)
    assert outcome.why == "killed by SIGABRT"
    found = json.loads(kept.read_text())
    assert found["passed"] == 1 and found["skipped"] == {"Skipped: not here": 1}
    assert found["failed"] == {"test_some.py::test_b": "assert 1 == 2"}


@pytest.mark.slow
def test_without_a_gpu_nothing_is_tried(tmp_path: Path) -> None:
    env = {**process.environment(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fastmtl.bench.gpu_check", "--results", str(tmp_path)]
    found = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr == "gpu-check: torch finds no CUDA device here\n"


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


def passes(**medians: float) -> dict[str, Any]:
    return {name: {"median_s": value} for name, value in medians.items()}


def test_targets_of_a_gpu() -> None:
    shape = {"name": "bert-base", "layers": 12}
    step = {"shape": shape, "tokens": 8000, "steps": passes(**{"fastmtl sum": 0.01, "transformers": 0.05})}
    compiled = passes(**{"fastmtl sum": 0.01, "transformers compiled": 0.019})
    variants = {RECORDED_JOINT: {"median_s": 1.0}, RECORDED_SURGERY: {"median_s": 1.07}}
    ways = passes(**{"sum": 0.009, "sum, flat, graphs": 0.002, "pcgrad, flat, graphs": 0.004})
    points = [{"series": "sum", "batch_size": 8, "error": -0.06}, {"series": "sum", "batch_size": 16}]
    result = {
        "environment": {"device": "NVIDIA H200"},
        "step": step,
        "step-compiled": {**step, "steps": compiled},
        "graphs": {**step, "steps": passes(**{"fastmtl sum, CUDA graphs": 0.02})},
        "surgery": [{"shape": shape, "tasks": 3, "tokens": 8000, "variants": variants}],
        "engine": [{"shape": shape, "tokens": n, "ways": ways} for n in (8192, 800)],
        "profile": [{"points": points}],
    }
    found = [(round(bound["measured"], 6), bound["bound"], bound["holds"]) for bound in bounds(result)]
    assert found == [
        (8e5, 7e5, True),
        (5.0, 4.0, True),
        (1.9, 2.0, False),
        (4e5, 7e5, False),
        (0.07, 0.08, True),
        (2.0, 3.0, True),
        (4.0, 3.0, False),
        (0.06, 0.05, False),
    ]
    result["environment"] = {"device": "NVIDIA H100 80GB HBM3"}
    assert [bound["bound"] for bound in bounds(result)][0] == 5.5e5
    result["environment"] = {"device": "another"}
    assert len(bounds(result)) == 6
    assert bounds({"surgery": [{"shape": shape, "tasks": 3, "tokens": 9, "variants": {}}]}) == []  # without variants


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the path for a fake compute-sanitizer, which gets the tool's name as $2."""
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    monkeypatch.setattr(sanitizer.shutil, "which", lambda _: str(path) if path.exists() else None)
    monkeypatch.chdir(ROOT)
    return path


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.slow
def test_the_small_run_under_a_clean_sanitizer(program: Path) -> None:
    assert sanitizer.sanitized("memcheck", "cpu") == "not run: compute-sanitizer is not on PATH"
    script = 'tool=$2; shift 4; [ $tool = memcheck ] && shift 2; "$@" || exit 1'
    write(program, f'{script}; echo "========= $tool SUMMARY: 0 errors"')
    assert {tool: sanitizer.sanitized(tool, "cpu") for tool in sanitizer.TOOLS} == {
        "memcheck": "clean",
        "racecheck": "clean",
    }


def test_what_a_sanitizer_may_say(program: Path) -> None:
    write(program, 'echo "========= Invalid __global__ read"; echo "========= ERROR SUMMARY: 1 error"; exit 3')
    for tool in sanitizer.TOOLS:
        found = sanitizer.sanitized(tool, "cpu")
        assert found == "found:\n========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error"
    assert sanitizer.outcome(0, "== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == "clean"
    assert sanitizer.outcome(0, "== RACECHECK SUMMARY: 2 hazards displayed").startswith("found")
    assert sanitizer.outcome(1, "== ERROR SUMMARY: 0 errors").startswith("found")  # the run failed
    assert sanitizer.outcome(0, "").startswith("found")  # no summary
    assert sanitizer.outcome(1, "== Error: Device not supported.").startswith("not run")


def test_files_are_named_after_the_device() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
