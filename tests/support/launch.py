"""Processes of tests: their environment, and the real launcher."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from fastmtl.engine.distributed import free_port


def python_path() -> str:
    """Return a PYTHONPATH with everything that this process can import, tests/support included."""
    return os.pathsep.join(filter(None, sys.path))


def children_seconds() -> float:
    """Return the processor time of all child processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_environment() -> dict[str, str]:
    """Return the environment of a script that trains on the CPU with one thread per process."""
    return {
        **os.environ,
        "PYTHONPATH": python_path(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def two_processes() -> list[str]:
    """Return the start of a command: `deepspeed` with two local processes on a free port."""
    run = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    return [*run, "--master_port", free_port()]


def nothing_in_shared_memory(port: str) -> bool:
    """Return True if the launch with this port has left no shared memory, which stays for ever."""
    return not list(Path("/dev/shm").glob(f"*_{port}_*"))
