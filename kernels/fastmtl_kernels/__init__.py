"""Kernels of multi-task training behind one public interface.

This package needs torch and no other part of fastmtl.

Every operation takes `impl`: "auto" selects the fastest implementation for the device and dtypes; a
named implementation never falls back to another. `implementations()` lists all implementations of
all operations, with the reason for each that is not available.
"""

from __future__ import annotations

from fastmtl_kernels.add_layer_norm.api import add_layer_norm, add_layer_norm_with_sum
from fastmtl_kernels.combined_adamw.api import combined_adamw
from fastmtl_kernels.disentangled_attention.api import disentangled_attention
from fastmtl_kernels.dispatch import Implementation, implementations
from fastmtl_kernels.dropout.api import dropout
from fastmtl_kernels.embed_layer_norm.api import embed_layer_norm
from fastmtl_kernels.geglu.api import geglu
from fastmtl_kernels.pool.api import pool
from fastmtl_kernels.task_gradients.api import combine, gramian
from fastmtl_kernels.task_maps.low_rank import lora, low_rank
from fastmtl_kernels.task_maps.pal import pal
from fastmtl_kernels.varlen_attention.api import varlen_attention
from fastmtl_kernels.weights import gradvac_weights, pcgrad_weights

__all__ = [
    "Implementation",
    "add_layer_norm",
    "add_layer_norm_with_sum",
    "combine",
    "combined_adamw",
    "disentangled_attention",
    "dropout",
    "embed_layer_norm",
    "geglu",
    "gradvac_weights",
    "gramian",
    "implementations",
    "lora",
    "low_rank",
    "pal",
    "pcgrad_weights",
    "pool",
    "varlen_attention",
]
