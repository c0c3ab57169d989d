"""Packages and the native kernels; all other metadata is in pyproject.toml.

The C++ kernels are built if a C++ compiler and torch are available. The CUDA kernels are built if
torch is a CUDA build and has a matching nvcc. For kernels that are not built, one line gives the
reason and the remedy (tools/build_kernels.py). torch is never a build requirement, since pip would
then download a second torch for its isolated build.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

# pip's builds do not search the folder of setup.py for modules.
sys.path.insert(0, str(Path(__file__).parent / "tools"))

from build_kernels import native_extension  # noqa: E402

setup(
    packages=find_packages(include=["fastmtl", "fastmtl.*"]) + find_packages("kernels"),
    # kernels/ is not a package: "kernels" is the name of another distribution.
    package_dir={"": ".", "fastmtl_kernels": "kernels/fastmtl_kernels"},
    package_data={
        "fastmtl": ["py.typed", "recipes/**/*.yaml"],
        "fastmtl.data": ["demo/*.csv", "demo/*.conll"],
        "fastmtl_kernels": ["py.typed"],
    },
    include_package_data=False,
    **native_extension(),
)
