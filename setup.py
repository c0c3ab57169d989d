"""Packages and the native extension; all other metadata is in pyproject.toml.

The extension is built where a C++ compiler and torch are at hand, with the CUDA kernels where torch is a CUDA build and
its nvcc is there too; one line tells what is left out and why. torch is never a build requirement: pip's isolated
builds would download a second one for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from typing import Any

from setuptools import find_packages, setup

# PyTorch's stable ABI of 2.11, the oldest torch we support: the library then also loads in every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"
# A100 and H100; PTX serves what is newer. torch reads the variable, so users may choose otherwise.
CUDA_ARCHITECTURES = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"}


def why_no_extension() -> str | None:
    """The reason why the native extension cannot be built here, None where it can."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "torch is not importable in this build; to build it, install torch first and use "
            "pip install --no-build-isolation"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}) on PATH"
    return None


def why_no_cuda() -> str | None:
    """The reason why the extension cannot have the CUDA kernels here, None where it can. torch is importable."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None
    if nvcc is None:
        return "there is no nvcc on PATH or under CUDA_HOME"
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda} and {nvcc} is CUDA {release[1] if release else 'unknown'}"
    return None


def say(line: str) -> None:
    """Prints in builds only: pip runs this file for the metadata too."""
    if BUILDS & set(sys.argv):
        print(f"fastmtl: {line}.")


def native_extension() -> dict[str, Any]:
    """setup()'s arguments that build fastmtl_kernels._C, none where it cannot be built."""
    reason = why_no_extension()
    if reason is not None:
        say(f"building without the C++ kernels: {reason}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    no_cuda = why_no_cuda()
    say(f"building without the CUDA kernels: {no_cuda}" if no_cuda else f"building for CUDA {CUDA_ARCHITECTURES}")
    flags = ["-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    extension = (CppExtension if no_cuda else CUDAExtension)(
        "fastmtl_kernels._C",
        sources=sorted(glob("csrc/*.cpp") if no_cuda else glob("csrc/*.cpp") + glob("csrc/*.cu")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.cuh")),
        # A square root that reports nothing in errno is one instruction for several lanes.
        extra_compile_args={"cxx": [*flags, "-g0", "-Wno-psabi", "-fno-math-errno"], "nvcc": flags},
        # Neither Python's nor torch's unstable ABI is used, so one wheel serves every Python and torch we support.
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["fastmtl", "fastmtl.*"]), "fastmtl_kernels"],
    # kernels/ is not a package itself: "kernels" is the name of another distribution.
    package_dir={"": ".", "fastmtl_kernels": "kernels/fastmtl_kernels"},
    package_data={
        "fastmtl": ["py.typed", "recipes/**/*.yaml"],
        "fastmtl.data": ["demo/*.csv"],
        "fastmtl_kernels": ["py.typed"],
    },
    include_package_data=False,
    **native_extension(),
)
