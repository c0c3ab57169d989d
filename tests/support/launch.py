"""The real launcher."""

from __future__ import annotations

import sys

from fastmtl.engine.distributed import free_port


def two_processes() -> list[str]:
    """The beginning of a command: `deepspeed` with two processes on this machine, on a port that is free."""
    run = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    return [*run, "--master_port", free_port()]
