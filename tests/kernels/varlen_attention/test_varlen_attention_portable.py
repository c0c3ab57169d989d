"""The C++ of varlen_attention for CPUs without AVX2 and FMA gives this CPU's results."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

COMPILER = os.environ.get("CXX", "c++").split()[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the portable path is what this machine runs")
def test_both_paths_agree(tmp_path: Path) -> None:
    here = Path(__file__)
    program = str(tmp_path / "varlen_attention_portable")
    includes = ["-isystem", str(Path(torch.__file__).parent / "include"), f"-I{here.parents[3] / 'csrc'}"]
    command = [COMPILER, "-O2", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-psabi", *includes]
    subprocess.run([*command, str(here.with_name("varlen_attention_portable.cpp")), "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "2320 compared\n", ran.stdout
