"""Loading of the compiled libraries beside this file.

_C has the kernels of csrc/*.cpp, _CUDA those of csrc/*.cu.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def why_unavailable() -> str:
    """Load the library of the C++ kernels.

    Returns:
        The reason why the library cannot be used here, "" if it can.
    """
    return _load("_C", "C++", "with a C++ compiler and torch installed")


@cache
def why_no_cuda_library() -> str:
    """Load the library of the CUDA kernels. Loading needs no GPU.

    Returns:
        The reason why the library cannot be loaded, "" if it is loaded.
    """
    # The C++ library defines the operators; the CUDA library only adds implementations to them.
    return why_unavailable() or _load("_CUDA", "CUDA", "with nvcc and a CUDA build of torch installed")


@cache
def why_no_cuda(device: torch.device) -> str:
    """Return the reason why the CUDA kernels cannot be used on the GPU `device`, "" if they can."""
    reason = why_no_cuda_library()
    if reason:
        return reason
    try:
        # Only a launch shows whether the kernels are built for this GPU and its driver.
        torch.ops.fastmtl.gramian([torch.zeros(1, device=device)], 1)
    except RuntimeError as error:
        return f"the CUDA kernels do not run on {device}: {str(error).splitlines()[0]}"
    return ""


def _load(library: str, kernels: str, needs: str) -> str:
    """Load a library; return the reason why it cannot be loaded, "" if it is loaded.

    library: its file name without suffixes. kernels: their name in the message. needs: what a build
    requires, for the message. A build that cannot make the library writes the reason to a .txt file
    of the same name, since only the build knows the compiler and torch that it found.
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
