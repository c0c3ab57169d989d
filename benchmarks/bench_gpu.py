"""The benchmarks of a GPU, and compute-sanitizer over a small run: the second half of `make gpu-check`.

The result goes to benchmarks/results/<the GPU's name>.json, part by part as each is measured, its pictures to a folder
of that name. What cannot run here is left out of it with the reason; nothing in it is estimated. Exit status 1 with
`failures`: something wrong or left out. A bound that does not hold is told, and is none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmtl.bench import ops
from fastmtl.bench.bounds import OVERHEAD, bounds
from fastmtl.bench.environment import environment
from fastmtl.bench.harness import Say
from fastmtl.bench.kernels import bench_kernels, way_names
from fastmtl.bench.ops.case import COMPILED
from fastmtl.bench.report import progress, save, show
from fastmtl.bench.result_file import slug
from fastmtl.bench.sizes import SHAPES, Size
from fastmtl.errors import UserError

HERE = Path(__file__).parent
SMALL_RUN = HERE / "small_gradients.py"
# torch and Triton ask the driver for things that may not be there: errors of such calls are none of the kernels'.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
TOOL_SECONDS = 120
CLEAN = "clean"
PEER_ROWS = 32
PROFILER = [sys.executable, "-c", "from fastmtl.cli import main; main()", "profile", "demo"]
PROFILER += ["--batch-sizes", "16,64", "--methods", "sum,pcgrad"]
PROFILER_SECONDS = 150
Part = Callable[[Say], dict[str, Any]]


def main() -> None:
    chosen = _options()
    result: dict[str, Any] = {"benchmark": "gpu-check"}
    result["environment"] = environment(torch.device(chosen.device), chosen.commit)
    name = slug(result["environment"]["device"])
    path = chosen.results / f"{name}.json"
    chosen.results.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    failures = []
    missing = _missing()
    if missing:
        failures.append(f"all but the kernels is left out: {missing}")
        print(f"gpu-check: {failures[0]}", file=sys.stderr)
    with progress() as say:
        for key, part in {**_kernels(chosen), **({} if missing else _steps(chosen))}.items():
            try:
                measured = part(say)
            except (RuntimeError, UserError) as error:  # a wrong result, or no memory; what comes next may be right
                failures.append(f"{key}: {error}")
                continue
            show(measured, console)
            failures += _drawn(measured, chosen.results / name)
            measured = {entry: value for entry, value in measured.items() if entry != "environment"}
            if key.startswith("surgery"):
                result.setdefault("surgery", []).append(measured)
            else:
                result[key] = measured
            save(result, path)
        if not missing:
            say("fastmtl profile")
            failures += _profiled(chosen, chosen.results / name / "profile")
        say("compute-sanitizer")
        result["compute-sanitizer"] = sanitized(chosen.device)
    failures += [f"{tool} {found}" for tool, found in result["compute-sanitizer"].items() if found.startswith("found")]
    result.update(bounds=bounds(result), failures=failures)
    save(result, path)
    for bound in result["bounds"]:
        verdict = "holds" if bound["holds"] else "DOES NOT HOLD"
        print(f"{bound['what']}: {bound['measured']:.3g}, bound {bound['bound']:.3g}: {verdict}")
    for tool, found in result["compute-sanitizer"].items():
        print(f"compute-sanitizer, {tool}: {found}")
    print(f"saved in {path}")
    if failures:
        sys.exit("\n".join(f"gpu-check failed: {failure}" for failure in failures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="git describe --always --dirty of this copy, where it has no .git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script")
    parser.add_argument("--shape", default="bert-base", choices=("bert-base", "minilm"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the directory of the result")
    return parser.parse_args()


def _size(chosen: argparse.Namespace, tasks: int = 3) -> Size:
    return Size(SHAPES[chosen.shape], tasks, chosen.tokens, chosen.device, "bf16", 0.1)


def _kernels(chosen: argparse.Namespace) -> dict[str, Part]:
    """Without torch.compile, which takes minutes: `fastmtl bench kernels` has it."""
    size = _size(chosen)
    impls = sorted(way_names(ops.OPERATIONS, size) - {COMPILED})
    return {
        "kernels": lambda say: bench_kernels(size, chosen.rounds, say, ops.OPERATIONS, impls, chosen.commit),
    }


def _steps(chosen: argparse.Namespace) -> dict[str, Part]:
    """What needs the packages of the encoder."""
    from dataclasses import replace

    from fastmtl.bench import peers, step, surgery

    def overhead(tasks: int) -> Part:
        size = replace(_size(chosen, tasks), dropout=0.0)
        return lambda say: surgery.bench_variants(size, chosen.rounds, say, commit=chosen.commit)

    size, shape = _size(chosen), SHAPES[chosen.shape]
    few = replace(size, shape=replace(shape, rows=min(PEER_ROWS, 4 * shape.rows)), dropout=0.0)
    return {
        "step": lambda say: step.bench_step(size, chosen.rounds, say, chosen.commit),
        "adapters": lambda say: step.bench_sweep("adapters", size, chosen.rounds, say, chosen.commit),
        "graphs": lambda say: step.bench_sweep("graphs", size, chosen.rounds, say, chosen.commit),
        **{f"surgery, {tasks} tasks": overhead(tasks) for tasks in OVERHEAD},
        "peers": lambda say: peers.bench_peers(few, chosen.rounds, say, commit=chosen.commit),
    }


def _drawn(measured: dict[str, Any], directory: Path) -> list[str]:
    """Draws a part; the reason why it cannot, which spoils no measurement."""
    try:
        from fastmtl.bench.plot import plot

        plot(measured, directory)
    except (ModuleNotFoundError, UserError) as error:
        return [f"no picture of {measured['benchmark']}: {error}"]
    return []


def _profiled(chosen: argparse.Namespace, directory: Path) -> list[str]:
    """Profiles the demo into a directory, profile.json and pictures; what went wrong."""
    command = [*PROFILER, "--output", str(directory), *(["--commit", chosen.commit] if chosen.commit else [])]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PROFILER_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"fastmtl profile did not end in {PROFILER_SECONDS} s; {directory} has the points until then"]
    print(run.stdout)
    return [f"fastmtl profile: {run.stderr.strip()[-500:]}"] if run.returncode else []


def _missing() -> str:
    """Why only kernels can be measured here, "" where all can: the rest needs the encoder's packages."""
    try:
        import fastmtl.bench.surgery  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{sys.executable} has no {error.name}"
    return ""


def sanitized(device: str) -> dict[str, str]:
    """For each tool CLEAN, "found ..." or why it did not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return dict.fromkeys(TOOLS, "not run: compute-sanitizer is not on PATH")
    return {tool: _sanitized(program, tool, device) for tool in TOOLS}


def _sanitized(program: str, tool: str, device: str) -> str:
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", "3", sys.executable, str(SMALL_RUN), device]
    # Without torch's cache of memory blocks a read past a tensor is one past its allocation.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        return f"not run to its end in {TOOL_SECONDS} s"
    return outcome(run.returncode, run.stdout + run.stderr)


def outcome(status: int, output: str) -> str:
    """CLEAN, "found ..." or why it did not run, from the exit status and output of compute-sanitizer."""
    if "Device not supported" in output:
        return "not run: compute-sanitizer does not support this device"
    if status == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", output):
        return CLEAN
    lines = [line for line in output.splitlines() if line.strip()] or [f"exit status {status} without output"]
    return "found:\n" + "\n".join(lines[-20:])


if __name__ == "__main__":
    main()
