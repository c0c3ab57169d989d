"""A BERT's embeddings on CPUs.

torch gathers the rows, the C++ kernels of csrc/add_layer_norm_cpu.cpp do the rest.

The sum of the three rows is that of a residual, an input and a summand, in one pass over memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmtl_kernels.dropout.cpp import dropout
from fastmtl_kernels.layer_norm import cpp as layer_norm
from fastmtl_kernels.layer_norm.common import RowNorm


def forward(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and z [N, d] of words' dtype, and mean and rstd [N] float32.

    ids and tables are in the order word, position, type.
    """
    words, positions, types = (F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
    plain = call._replace(dropout_p=0.0)
    y, z, mean, rstd = layer_norm.forward(words, positions, types, weight, bias, None, None, plain)
    return y if seed is None else dropout(y, call.dropout_p, seed, out=y), z, mean, rstd


def backward(
    dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None, call: RowNorm
) -> tuple[Tensor, Tensor]:
    """Return dz [N, d] and the gradients of weight and bias, as of layer_norm.cpp.backward."""
    dh = dy if seed is None else dropout(dy, call.dropout_p, seed)
    plain = call._replace(dropout_p=0.0)
    dz, _, sums = layer_norm.backward(dh, z, mean, rstd, weight, None, plain)
    return dz, sums
