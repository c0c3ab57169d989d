"""A BERT's embeddings on CPUs: torch gathers, the C++ kernels of csrc/add_layer_norm_cpu.cpp do the rest.

The sum of the three rows is that of add_layer_norm, which reads and writes memory once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fastmtl_kernels.add_layer_norm import cpp as add_layer_norm_cpp
from fastmtl_kernels.dropout.cpp import dropout

if TYPE_CHECKING:
    from fastmtl_kernels.add_layer_norm.api import RowNorm


def forward(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and z [N, d] of words' dtype, mean and rstd [N] float32; ids and tables in the order word, position, type."""
    words, positions, types = (F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
    plain = call._replace(dropout_p=0.0)
    y, z, mean, rstd, _ = add_layer_norm_cpp.forward(words, positions, types, None, weight, bias, None, plain)
    return y if seed is None else dropout(y, call.dropout_p, seed, out=y), z, mean, rstd


def backward(
    dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None, call: RowNorm
) -> tuple[Tensor, Tensor]:
    """dz [N, d] and the gradients of weight and bias, float32 [2, T or 1, d] as of add_layer_norm_cpp.backward."""
    dh = dy if seed is None else dropout(dy, call.dropout_p, seed)
    plain = call._replace(dropout_p=0.0)
    dz, _, sums = add_layer_norm_cpp.backward(dh, z, mean, rstd, weight, None, plain, dx_dtype=None, num_sums=2)
    return dz, sums[:2]
