"""The benchmarks of a GPU, and compute-sanitizer over a small run: the second half of `make gpu-check`.

The result goes to benchmarks/results/<the GPU's name>.json, part by part as each is measured. What cannot run here is
left out of it with the reason; nothing in it is estimated. Exit status 1 with `failures`: something wrong or left out.
A bound that does not hold is told, and is none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmtl.bench.environment import environment, slug
from fastmtl.bench.gradients import NUM_COLUMNS, bench_gradients
from fastmtl.bench.harness import Say
from fastmtl.bench.report import progress, save, show

HERE = Path(__file__).parent
SMALL_RUN = HERE / "small_gradients.py"
VARIANT = "pcgrad stacked bf16"
OVERHEAD = {3: 0.08, 8: 0.15}  # of VARIANT over the joint step, by the number of tasks
SHARE = 0.85  # of a copy's speed, gramian and combine together
# torch and Triton ask the driver for things that may not be there: errors of such calls are none of the kernels'.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
TOOL_SECONDS = 120
CLEAN = "clean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="git describe --always --dirty of this copy, where it has no .git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script")
    parser.add_argument("--shape", default="bert-base", choices=("bert-base", "minilm"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=NUM_COLUMNS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the directory of the result")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    result: dict[str, Any] = {"benchmark": "gpu-check", "environment": environment(device, chosen.commit)}
    path = chosen.results / f"{slug(result['environment']['device'])}.json"
    chosen.results.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    failures = []
    missing = _missing()
    if missing:
        failures.append(f"the surgery benchmark is left out: {missing}")
        print(f"gpu-check: {failures[0]}", file=sys.stderr)
    with progress() as say:
        result["gradients"] = _part(bench_gradients(device, chosen.rounds, say, columns=chosen.columns), console)
        save(result, path)
        result["surgery"] = []
        for tasks in () if missing else OVERHEAD:
            try:
                result["surgery"].append(_surgery(tasks, chosen, say, console))
            except RuntimeError as error:  # a wrong gradient, or no memory; what comes next may be right
                failures.append(f"surgery with {tasks} tasks: {error}")
            save(result, path)
        say("compute-sanitizer")
        result["compute-sanitizer"] = sanitized(chosen.device)
    failures += [f"{tool} {found}" for tool, found in result["compute-sanitizer"].items() if found.startswith("found")]
    result.update(bounds=_bounds(result), failures=failures)
    save(result, path)
    for bound in result["bounds"]:
        verdict = "holds" if bound["holds"] else "DOES NOT HOLD"
        print(f"{bound['what']}: {bound['measured']:.1%}, bound {bound['bound']:.0%}: {verdict}")
    for tool, found in result["compute-sanitizer"].items():
        print(f"compute-sanitizer, {tool}: {found}")
    print(f"saved in {path}")
    if failures:
        sys.exit("\n".join(f"gpu-check failed: {failure}" for failure in failures))


def _part(measured: dict[str, Any], console: Console) -> dict[str, Any]:
    """Shows a benchmark's result; without what all of them have in common."""
    show(measured, console)
    return {key: value for key, value in measured.items() if key != "environment"}


def _missing() -> str:
    """The reason why there is no surgery benchmark here, "" where there is none: it needs packages of the encoder."""
    try:
        import fastmtl.bench.surgery  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{sys.executable} has no {error.name}"
    return ""


def _surgery(tasks: int, chosen: argparse.Namespace, say: Say, console: Console) -> dict[str, Any]:
    from fastmtl.bench.sizes import SHAPES, Size
    from fastmtl.bench.surgery import bench_variants

    size = Size(SHAPES[chosen.shape], tasks, chosen.tokens, chosen.device, "bf16")
    return _part(bench_variants(size, chosen.rounds, say, commit=chosen.commit), console)


def _bounds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the design promises of a GPU beside what was measured, as shares."""
    bounds = []
    for part in result["surgery"]:
        measured, bound = part["variants"][VARIANT]["ratio_to_joint"] - 1, OVERHEAD[part["tasks"]]
        what = f"PCGrad over the joint step, {part['shape']['name']}, {part['tasks']} tasks, {part['tokens']} tokens"
        bounds.append({"what": what, "measured": measured, "bound": bound, "holds": measured <= bound})
    impl = result["environment"]["kernels"]["gramian"]
    for dtype, operations in result["gradients"]["dtypes"].items():
        measured = operations["both"][impl]["share_of_copy"]
        what = f"gramian and combine ({impl}, {dtype}) of the copy's speed"
        bounds.append({"what": what, "measured": measured, "bound": SHARE, "holds": measured >= SHARE})
    return bounds


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
