"""The build of the native kernels, for setup.py: fastmtl_kernels._C of csrc/*.cpp and beside it _CUDA of csrc/*.cu.

They are two libraries so that nothing about CUDA can cost the C++ kernels, neither in the build nor when they are
loaded. The C++ one is an ordinary extension of torch's; the CUDA one is a single call of nvcc, whose failure is caught
and whose output says why. What is left out gets a text file in its library's place (_C.txt, _CUDA.txt) with the reason
that was printed: pip shows nothing of a build that succeeds, and the compiler that failed may be gone, or be on another
machine, when `fastmtl doctor` is asked days later.
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

# PyTorch's stable ABI of 2.11, the oldest torch we support: the libraries then also load in every later one.
OLDEST_TORCH = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"
FLAGS = ["-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
# A square root that reports nothing in errno is one instruction for several lanes.
CXX_FLAGS = [*FLAGS, "-g0", "-Wno-psabi", "-fno-math-errno"]
NVCC_FLAGS = [
    *FLAGS,
    "-std=c++20",
    # As torch compiles its own: only its types convert.
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
]
# A100 and H100; PTX serves what is newer. Users may choose otherwise by torch's TORCH_CUDA_ARCH_LIST.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"}


def native_extension() -> dict[str, Any]:
    """Return setup()'s arguments that build the kernels; without a compiler those that leave the reason instead."""
    try:
        check_cpp(os.environ)
    except LeftOut as reason:
        return _without_cpp(str(reason))
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Builds _C as torch does, then _CUDA beside it."""

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
        # Neither Python's nor torch's unstable ABI is used, so one wheel serves every Python and torch we support.
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def check_cpp(environment: Mapping[str, str]) -> None:
    """Raise LeftOut where the C++ kernels cannot be built: torch and a compiler of C++20 are needed."""
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
    """Build the CUDA kernels into a folder; return what they were built for.

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
    """Return nvcc's options for a list such as "8.0;9.0+PTX", in torch's own reading of it."""
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    try:
        return cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        raise LeftOut(f"TORCH_CUDA_ARCH_LIST is {architectures}: {error}; unset it") from None


def wheel_of(torch_cuda: str | None, home: Path) -> Path | None:
    """Return the folder of NVIDIA's packages beside torch that have its cudart, None where there is none."""
    major = (torch_cuda or "").split(".")[0]
    folders = [home.parent / "nvidia" / name for name in (f"cu{major}", "cuda_runtime")]
    return next((folder for folder in folders if list((folder / "lib").glob("libcudart.so.*"))), None)


def compile_cuda(
    toolkit: Toolkit, home: Path, sources: list[str], library: Path, environment: Mapping[str, str]
) -> None:
    """Compile and link the CUDA kernels against torch's headers and libraries in `home`; raises LeftOut."""
    command = [toolkit.nvcc, "-shared", "-Xcompiler=-fPIC,-g0", *NVCC_FLAGS, "-isystem", str(home / "include")]
    link = [f"-L{home / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_cuda"]
    try:
        run([*command, *sources, *toolkit.options, *link, "-o", str(library)], environment)
    except LeftOut as reason:
        advice = "install another release of that toolkit and set CUDA_HOME to its folder"
        raise LeftOut(f"{toolkit.nvcc} does not build csrc/*.cu: {reason}; {advice}") from None


def leave_out(folder: Path, library: str, kernels: str, reason: str) -> None:
    """Say what is left out, put the reason in the library's place and remove what an earlier build left there."""
    say(f"building without the {kernels} kernels: {reason}")
    for path in folder.glob(f"{library}.*so"):
        path.unlink()
    (folder / f"{library}.txt").write_text(reason + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Print in builds only: pip runs setup.py for the metadata too."""
    if BUILDS & set(sys.argv):
        print(f"fastmtl: {line}.")


def _built(folder: Path, library: str) -> None:
    (folder / f"{library}.txt").unlink(missing_ok=True)


def _without_cpp(reason: str) -> dict[str, Any]:
    class LeaveReason(build_py):
        """Puts the reason beside the packages' files, those of the checkout in an editable installation."""

        def run(self) -> None:
            super().run()
            package = self.get_package_dir("fastmtl_kernels") if self.editable_mode else None
            folder = Path(package or Path(self.build_lib) / "fastmtl_kernels")
            leave_out(folder, "_C", "C++", reason)

    return {"cmdclass": {"build_py": LeaveReason}}
