"""Packages and the native kernels; all other metadata is in pyproject.toml.

The kernels are built where a C++ compiler and torch are at hand, those of CUDA where torch is a CUDA build and an nvcc
for it is there too; one line tells what is left out, why, and what to do (tools/build_kernels.py). torch is never a
build requirement: pip's isolated builds would download a second one for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

# pip's builds do not search the folder of setup.py.
sys.path.insert(0, str(Path(__file__).parent / "tools"))

from build_kernels import native_extension  # noqa: E402

setup(
    packages=find_packages(include=["fastmtl", "fastmtl.*"]) + find_packages("kernels"),
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
