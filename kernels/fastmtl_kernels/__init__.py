"""Kernels of multi-task training behind one public interface; they need torch and nothing else of fastmtl.

Every operation takes `impl`: "auto" picks by device and dtype what is fastest there, a name asks for that one and never
gets another. `implementations()` lists what there is, what is missing and why.
"""

from __future__ import annotations

from fastmtl_kernels.api import Implementation, combine, gramian, implementations
from fastmtl_kernels.weights import gradvac_weights, pcgrad_weights

__all__ = ["Implementation", "combine", "gradvac_weights", "gramian", "implementations", "pcgrad_weights"]
