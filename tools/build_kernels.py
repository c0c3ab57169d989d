"""The build of the native kernels: fastmtl_kernels._C from csrc/*.cpp, and _CUDA from csrc/*.cu.

They are two libraries, so that a problem with CUDA cannot affect the C++ kernels, neither at build
time nor at load time. The C++ library is an ordinary torch extension. The CUDA library is a single
call of nvcc, whose failure is caught and reported. A library that is not built is replaced by a
text file (_C.txt, _CUDA.txt) with the reason. pip shows no output of a successful build, so
`fastmtl doctor` prints the text of that file, even if the build ran on another machine.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py

from cuda_toolkit import LeftOut, Toolkit, find_toolkit, run

# PyTorch's stable ABI of 2.11, the oldest supported torch. The libraries load in all later ones.
OLDEST_TORCH = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"
FLAGS = ["-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
# Without errno, the compiler can compute several square roots by one vector instruction.
CXX_FLAGS = [*FLAGS, "-g0", "-Wno-psabi", "-fno-math-errno"]
NVCC_FLAGS = [
    *FLAGS,
    "-std=c++20",
    # As torch builds its own kernels: c10's 16-bit types have operators, CUDA's have none.
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
]
# A100 and H100, and PTX for newer GPUs. The variable TORCH_CUDA_ARCH_LIST overrides this.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"}


def native_extension() -> dict[str, Any]:
    """Return arguments for setup() that build the kernels, or save the reason for not building."""
    try:
        check_cpp(os.environ)
    except LeftOut as reason:
        return _without_cpp(str(reason))
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Build _C as torch does, then _CUDA beside it."""

        def run(self) -> None:
            super().run()
            folder = Path(self.get_ext_fullpath("fastmtl_kernels._C")).parent
            _built(folder, "_C")
            try:
                say(f"building for CUDA {build_cuda(folder, os.environ)}")
            except LeftOut as reason:
                leave_out(folder, "_CUDA", "CUDA", str(reason))

    extension = CppExtension(
        "fastmtl_kernels._C",
        sources=sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        extra_compile_args={"cxx": CXX_FLAGS},
        # No unstable ABI of Python or torch is used, so one wheel serves all supported versions.
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def check_cpp(environment: Mapping[str, str]) -> None:
    """Raise LeftOut if the C++ kernels cannot be built: torch and a C++20 compiler are needed."""
    try:
        import torch
    except ImportError:
        raise LeftOut(
            "torch is not importable in this build; to build it, install torch first and use "
            "pip install --no-build-isolation"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, OLDEST_TORCH.split("."))):
        raise LeftOut(f"torch {torch.__version__} is older than {OLDEST_TORCH}; pip install --upgrade torch")
    command = shlex.split(environment.get("CXX", "c++"))
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        raise LeftOut(f"there is no C++ compiler ({command[0]}) on PATH")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <span>\nint size(std::span<int> x) { return x.size(); }\n")
        try:
            run([*command, "-std=c++20", "-shared", "-fPIC", str(source), "-o", f"{folder}/probe.so"], environment, 120)
        except LeftOut as reason:
            raise LeftOut(f"{shlex.join(command)} does not compile C++20: {reason}") from None


def build_cuda(folder: Path, environment: Mapping[str, str]) -> str:
    """Build the CUDA kernels into a folder; return a description of their targets and the compiler.

    Raises:
        LeftOut: there is no toolkit for this torch, or its nvcc fails.
    """
    import torch

    architectures = environment.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    home = Path(torch.__file__).parent
    options = cuda_architectures(architectures) if torch.version.cuda else []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        wheel = wheel_of(torch.version.cuda, home)
        toolkit = find_toolkit(torch.version.cuda, environment, wheel, scratch, options)
        made = scratch / "_CUDA.abi3.so"
        compile_cuda(toolkit, home, sorted(glob("csrc/*.cu")), made, environment)
        shutil.copy(made, folder)
    _built(folder, "_CUDA")
    return f"{architectures} by {toolkit.nvcc} ({toolkit.release})"


def cuda_architectures(architectures: str) -> list[str]:
    """Return nvcc's options for a list such as "8.0;9.0+PTX", as torch parses it."""
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    try:
        return cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        raise LeftOut(f"TORCH_CUDA_ARCH_LIST is {architectures}: {error}; unset it") from None


def wheel_of(torch_cuda: str | None, home: Path) -> Path | None:
    """Return the folder with CUDA's runtime that pip has installed beside torch, or None.

    home: torch's own folder.
    """
    major = (torch_cuda or "").split(".")[0]
    folders = [home.parent / "nvidia" / name for name in (f"cu{major}", "cuda_runtime")]
    return next((folder for folder in folders if list((folder / "lib").glob("libcudart.so.*"))), None)


def compile_cuda(
    toolkit: Toolkit, home: Path, sources: list[str], library: Path, environment: Mapping[str, str]
) -> None:
    """Compile `sources` with torch's headers in `home` and link them with its libraries.

    library: the file to write. Raises LeftOut if nvcc fails.
    """
    command = [toolkit.nvcc, "-shared", "-Xcompiler=-fPIC,-g0", *NVCC_FLAGS, "-isystem", str(home / "include")]
    link = [f"-L{home / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_cuda"]
    try:
        run([*command, *sources, *toolkit.options, *link, "-o", str(library)], environment)
    except LeftOut as reason:
        advice = "install another release of that toolkit and set CUDA_HOME to its folder"
        raise LeftOut(f"{toolkit.nvcc} does not build csrc/*.cu: {reason}; {advice}") from None


def leave_out(folder: Path, library: str, kernels: str, reason: str) -> None:
    """Print the reason for missing kernels, save it in `folder`, and remove older builds.

    library: "_C" or "_CUDA". kernels: "C++" or "CUDA".
    """
    say(f"building without the {kernels} kernels: {reason}")
    for path in folder.glob(f"{library}.*so"):
        path.unlink()
    (folder / f"{library}.txt").write_text(reason + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Print a line during a build; nothing while pip runs setup.py only for the metadata."""
    if BUILDS & set(sys.argv):
        print(f"fastmtl: {line}.")


def _built(folder: Path, library: str) -> None:
    (folder / f"{library}.txt").unlink(missing_ok=True)


def _without_cpp(reason: str) -> dict[str, Any]:
    class LeaveReason(build_py):
        """Save the reason beside the package's files (in the checkout, for an editable install)."""

        def run(self) -> None:
            super().run()
            package = self.get_package_dir("fastmtl_kernels") if self.editable_mode else None
            folder = Path(package or Path(self.build_lib) / "fastmtl_kernels")
            leave_out(folder, "_C", "C++", reason)

    return {"cmdclass": {"build_py": LeaveReason}}
