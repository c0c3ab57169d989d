"""A small run of the kernels under a tool of compute-sanitizer.

    python -m fastmtl.bench.gpu_check.sanitizer memcheck cuda FILE

What cannot run here is no failure, and the file has the reason. Exit status 1 where the tool found something.
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
# torch and Triton ask the driver for things that may not be there: errors of such calls are none of the kernels'.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
TOOL_SECONDS = 120
CLEAN = "clean"


def sanitized(tool: str, device: str) -> str:
    """Return CLEAN, "found ..." or why the tool did not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: compute-sanitizer is not on PATH"
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", "3", sys.executable, str(SMALL_RUN), device]
    # Without torch's cache of memory blocks a read past a tensor is one past its allocation.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        return f"not run to its end in {TOOL_SECONDS} s"
    return outcome(run.returncode, run.stdout + run.stderr)


def outcome(status: int, output: str) -> str:
    """Return CLEAN, "found ..." or why it did not run, from the exit status and output of compute-sanitizer."""
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
