"""The exit of a process of a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from launch import python_path

from fastmtl.engine.distributed import free_port

SCRIPT = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("at the end:", dist.is_initialized()))  # called last
from fastmtl.engine.distributed import join, this_process
ranks = this_process()
join(ranks)
print("joined:", dist.is_initialized())
"""


@pytest.mark.slow
def test_a_process_leaves_the_others_before_python_shuts_down() -> None:
    """torch sometimes aborts if gloo's threads still hold tensors while Python shuts down."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**os.environ, **place, "PYTHONPATH": python_path()}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if ": " in line] == ["joined: True", "at the end: False"]
