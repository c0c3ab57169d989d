"""The compiled libraries beside this file: _C of csrc/*.cpp and _CUDA of csrc/*.cu."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def why_unavailable() -> str:
    """Load the library of the C++ kernels.

    Returns:
        The reason why it cannot be used here, "" where it can.
    """
    return _load("_C", "C++", "with a C++ compiler and torch installed")


@cache
def why_no_cuda_library() -> str:
    """Load the library of the CUDA kernels; return the reason why there is none, "" where there is.

    Needs no GPU.
    """
    # The C++ library defines the operators, to which this one only adds implementations.
    return why_unavailable() or _load("_CUDA", "CUDA", "with nvcc and a CUDA build of torch installed")


@cache
def why_no_cuda(device: torch.device) -> str:
    """Return the reason why the CUDA kernels cannot be used on a GPU, "" where they can."""
    reason = why_no_cuda_library()
    if reason:
        return reason
    try:
        # Only a launch shows whether they are built for this GPU and its driver.
        torch.ops.fastmtl.gramian([torch.zeros(1, device=device)], 1)
    except RuntimeError as error:
        return f"the CUDA kernels do not run on {device}: {str(error).splitlines()[0]}"
    return ""


def _load(library: str, kernels: str, needs: str) -> str:
    """Load a library; return the reason why it cannot be loaded, "" where it is.

    A build that makes no library writes the reason in its place: it knows the compiler and torch.
    """
    folder = Path(__file__).parent
    libraries = sorted(folder.glob(f"{library}.*so"))
    if not libraries:
        left_out = folder / f"{library}.txt"
        how = "`make -B install` or `pip install --no-build-isolation .` in a checkout of fastmtl builds them"
        if left_out.is_file():
            return (
                f"the {kernels} kernels are not built: {left_out.read_text(encoding='utf-8').strip()}; after that {how}"
            )
        return f"the {kernels} kernels are not built; {needs}, {how}"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the {kernels} kernels do not load: {error}"
    return ""
