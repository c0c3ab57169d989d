"""Gradient surgery on a GPU: fp16 under DeepSpeed's loss scale, and a torch optimiser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("gpu") / "found.json"
    run = subprocess.run([sys.executable, HERE / "gpu_cases.py", file], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(file.read_text())


METHODS = ["sum-fp16-auto", "pcgrad-fp16-auto", "pcgrad-fp16-replay"]
FLAT = ["zero1-acc1-sum-fp16-auto-flat", "zero1-acc1-pcgrad-fp16-auto-flat"]


@pytest.mark.parametrize("case", [f"zero{zero}-acc1-{method}" for zero in (1, 2, 3) for method in METHODS] + FLAT)
def test_fp16_backs_off_and_trains(found: dict[str, Any], case: str) -> None:
    result = found[case]
    assert result["skipped"] == [None] * len(result["skipped"])  # an overflow is not a task's failure
    assert 0 < result["overflows"] < len(result["losses"]) / 2
    assert result["scale"] == 2.0 ** (32 - result["overflows"])
    assert result["finite"]
    assert result["losses"][-1] < 0.9 * result["losses"][0]
