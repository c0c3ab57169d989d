"""Compile csrc/*.cu to device code with nvcc, and read the registers and memory of each kernel.

No GPU is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from build_kernels import NVCC_FLAGS

ROOT = Path(__file__).parents[1]


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cu"))


def why_no_nvcc() -> str:
    """Return the reason why nothing can be compiled here, "" if nvcc works."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    release = re.search(
        r"release (\d+)\.(\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    return "" if release and (int(release[1]), int(release[2])) >= (12, 1) else "nvcc is older than CUDA 12.1"


def compile_source(source: Path, capability: int) -> dict[str, dict[str, int]]:
    """Return {kernel: bytes spilled, registers, bytes of static shared memory} for a source.

    A kernel's key is its mangled name without the unnamed namespace. Only device code is generated,
    in half the time of a full compilation, but errors in host code are found, too. Raises
    RuntimeError with nvcc's output if the file does not compile.
    """
    import torch

    include = Path(torch.__file__).parent / "include"
    command = [
        "nvcc",
        "-cubin",
        f"-arch=sm_{capability}",
        *NVCC_FLAGS,
        "-Xptxas=-v",
        "-isystem",
        str(include),
        str(source),
    ]
    with tempfile.TemporaryDirectory() as folder:
        command += ["-o", str(Path(folder) / "kernels.cubin")]
        compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if compiled.returncode:
        raise RuntimeError(compiled.stderr)
    return _resources(compiled.stderr + compiled.stdout)


def _resources(report: str) -> dict[str, dict[str, int]]:
    """Return the result of `compile_source` from the output of ptxas -v."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        found[_without_namespace(part.split("'")[1])] = {
            "spilled": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part))),
            "registers": int(re.findall(r"Used (\d+) registers", part)[0]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def _without_namespace(mangled: str) -> str:
    """Return a name without the unnamed namespace, whose own name differs in every compilation."""
    found = re.search(r"(\d+)(?=_GLOBAL__N_)", mangled)
    return mangled if found is None else mangled[: found.start()] + mangled[found.end() + int(found[1]) :]
