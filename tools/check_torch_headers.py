"""Compile csrc/ against the headers of other versions of torch.

    python tools/check_torch_headers.py 2.11.0 newest

The headers come from torch's wheel for macOS on arm64: it has all headers of torch that csrc/
includes, also those for CUDA, and a tenth of the size of a CUDA wheel. pip downloads the wheel
once, and the headers stay in .cache/torch-headers. Without nvcc, only the C++ files are compiled,
and the output says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvcc_aot
from build_kernels import CXX_FLAGS, NVCC_FLAGS

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "torch-headers"
# All tags of torch's wheels for macOS since 2.11. The headers do not depend on Python's version.
PLATFORMS = ("macosx_11_0_arm64", "macosx_12_0_arm64", "macosx_13_0_arm64", "macosx_14_0_arm64")
WHEEL = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", *(f"--platform={name}" for name in PLATFORMS)]


def main(versions: list[str]) -> None:
    why_no_nvcc = nvcc_aot.why_no_nvcc()
    failed = False
    for version in map(exact, versions):
        commands = {source.name: command(source, headers(version)) for source in sources(not why_no_nvcc)}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, problem in zip(commands, pool.map(compile_problem, commands.values()), strict=True):
                failed = failed or bool(problem)
                print(f"torch {version}  {name}: {problem or 'compiles'}", flush=True)
        if why_no_nvcc:
            print(f"torch {version}  *.cu: not compiled: {why_no_nvcc}")
    sys.exit(failed)


def exact(version: str) -> str:
    """Return `version`; for "newest", the version that pip would install."""
    if version != "newest":
        return version
    found = json.loads(pip("install", "--dry-run", "--quiet", "--report=-", "--target=unused", *WHEEL, "torch"))
    return found["install"][0]["metadata"]["version"]


def headers(version: str) -> Path:
    """Return the folder of torch's headers; download and unpack them on first use."""
    folder = CACHE / version
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            pip("download", "--quiet", "--no-cache-dir", f"--dest={name}", *WHEEL, f"torch=={version}")
            (wheel,) = Path(name).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                members = [member for member in archive.namelist() if member.startswith("torch/include/torch/")]
                archive.extractall(Path(name) / "unpacked", members)
            # The rename is atomic: an interrupted run leaves no partial headers.
            (Path(name) / "unpacked").rename(folder)
    return folder / "torch" / "include"


def pip(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} of torch's wheel failed: {done.stderr.strip()}")
    return done.stdout


def sources(with_cuda: bool) -> list[Path]:
    found = [*(ROOT / "csrc").glob("*.cu")] if with_cuda else []
    return [*found, *sorted((ROOT / "csrc").glob("*.cpp"))]


def command(source: Path, include: Path) -> list[str]:
    """Return the command that compiles `source` and discards the object file.

    Optimisation is off, to save time: the compiler finds errors in headers before it optimises.
    """
    if source.suffix == ".cu":
        return ["nvcc", "-c", "-arch=sm_80", *NVCC_FLAGS, "-isystem", str(include), str(source), "-o", os.devnull]
    compiler = os.environ.get("CXX", "c++").split()
    return [*compiler, "-c", "-std=c++20", *CXX_FLAGS, "-O0", "-isystem", str(include), str(source), "-o", os.devnull]


def compile_problem(command: list[str]) -> str:
    """Return the compiler's output if it fails, else ""."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""


if __name__ == "__main__":
    main(sys.argv[1:])
