"""Run a small part of the kernels under a tool of compute-sanitizer.

    python -m fastmtl.bench.gpu_check.sanitizer memcheck cuda FILE

The outcome is printed and saved in FILE. The exit status is 1 if the tool found something. A tool
that cannot run is no failure; the outcome is the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from fastmtl.measure.result_file import save

SMALL_RUN = Path("benchmarks") / "small_gradients.py"
# torch and Triton call the driver to find optional features. Errors of these calls are not errors
# of the kernels, so they are not reported.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
TOOL_SECONDS = 120
CLEAN = "clean"


def sanitized(tool: str, device: str) -> str:
    """Run the kernels under a tool; return CLEAN, "found ..." or why the tool did not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: compute-sanitizer is not on PATH"
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", "3", sys.executable, str(SMALL_RUN), device]
    # Without torch's cache of memory blocks, a read past a tensor is a read past its allocation,
    # which the tool sees.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        return f"not run: not finished within {TOOL_SECONDS} s"
    return outcome(run.returncode, run.stdout + run.stderr)


def outcome(status: int, output: str) -> str:
    """Return CLEAN, "found ..." or why the tool did not run, from its exit status and output."""
    if "Device not supported" in output:
        return "not run: compute-sanitizer does not support this device"
    if status == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", output):
        return CLEAN
    lines = [line for line in output.splitlines() if line.strip()] or [f"exit status {status} without output"]
    return "found:\n" + "\n".join(lines[-20:])


if __name__ == "__main__":
    tool, device, file = sys.argv[1:]
    found = sanitized(tool, device)
    save({tool: found}, Path(file))
    print(f"compute-sanitizer, {tool}: {found}")
    sys.exit(found.startswith("found"))
