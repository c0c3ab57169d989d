"""Packages and the native extension; all other metadata is in pyproject.toml.

The extension is built where a C++ compiler and torch are at hand and skipped, with one line, where they are not. torch
is never a build requirement: pip's isolated builds would download a second one for it.
"""

from __future__ import annotations

import os
import shutil
import sys
from glob import glob
from typing import Any

from setuptools import find_packages, setup

# PyTorch's stable ABI of 2.11, the oldest torch we support: the library then also loads in every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"
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


def native_extension() -> dict[str, Any]:
    """setup()'s arguments that build fastmtl_kernels._C, none where it cannot be built."""
    reason = why_no_extension()
    if reason is not None:
        # pip runs this file for the metadata too; the line belongs to the build.
        if BUILDS & set(sys.argv):
            print(f"fastmtl: building without the C++ kernels: {reason}.")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "fastmtl_kernels._C",
        sources=sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        extra_compile_args=["-O3", "-g0", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
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
