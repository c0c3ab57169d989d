"""csrc/*.cu compile with nvcc against torch's headers, for each architecture that is built, without spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# The target and the options of setup.py and of torch's build of extensions.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-DTORCH_TARGET_VERSION=" + re.findall(r'TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text())[0],
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
]


def why_no_nvcc() -> str:
    if shutil.which("nvcc") is None:
        return "no nvcc"
    release = re.search(
        r"release (\d+)\.(\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    return "" if release and (int(release[1]), int(release[2])) >= (12, 1) else "nvcc is older than CUDA 12.1"


def resources(report: str) -> dict[str, dict[str, int]]:
    """For each kernel bytes of spills, registers and bytes of shared memory, from what ptxas -v prints."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.split("'")[1]] = {
            "spills": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part))),
            "registers": int(re.findall(r"Used (\d+) registers", part)[0]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


@pytest.mark.skipif(bool(why_no_nvcc()), reason=why_no_nvcc())
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_compiles_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    """To device code alone, which checks the host's part too but saves half of the time."""
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-cubin", f"-arch={architecture}", *FLAGS, "-Xptxas=-v", "-isystem", str(include)]
    compiled = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True, timeout=300
    )
    assert compiled.returncode == 0, compiled.stderr
    kernels = resources(compiled.stderr + compiled.stdout)
    assert len(kernels) >= 4
    for name, used in kernels.items():
        assert used["spills"] == 0, (name, used)
        # At least one block of 256 threads fits, without more than the shared memory every block may have.
        assert used["registers"] <= 255 and used["shared"] <= 48 << 10, (name, used)
        if "gramian_kernel" in name or "combine_kernel" in name:  # two blocks, to hide the latency of the loads
            assert used["registers"] <= 128, (name, used)
