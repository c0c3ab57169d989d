"""The examples of docs/surgery.md, run unchanged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtl.engine.distributed import free_port

PAGE = Path(__file__).parents[2] / "docs" / "surgery.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
# At its first start on a CPU, DeepSpeed compiles an operator for a minute that only its sharded
# inference uses.
RUN = """
import deepspeed, runpy, sys
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
runpy.run_path(sys.argv[1], run_name="__main__")
"""
EXAMPLES = [block for block in BLOCKS if "from fastmtl.surgery import" in block]


def test_every_way_is_shown() -> None:
    hugging_face, plain_loop, own_layers = EXAMPLES
    assert "deepspeed" not in plain_loop and "SurgeryAdamW(" in plain_loop
    assert "from transformers import" in hugging_face and "surgery.backward(" in hugging_face
    assert "from fastmtl.surgery.functional import" in own_layers and "surgery.run(" in own_layers
    (printed,) = PRINTED
    assert len(printed.splitlines()) == 5 and TEXT.index(printed) < TEXT.index(hugging_face)


@pytest.mark.slow(17)
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number], encoding="utf-8")
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**os.environ, **ranks, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(["-c", RUN] if "deepspeed" in EXAMPLES[number] else []), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    steps = [line for line in done.stdout.splitlines() if "conflicts" in line]
    assert len(steps) == 5
    if number == 0:  # losses depend on the machine in their last digits
        assert [shape_of(line) for line in steps] == [shape_of(line) for line in PRINTED[0].splitlines()]


def shape_of(line: str) -> str:
    """Return a printed line with its step's number, and "#" for every later number."""
    step, rest = line.split(" ", 1)
    return step + re.sub(r"\d+(\.\d+)?", "#", rest)
