"""The embeddings of a BERT on CPUs.

torch gathers the rows of the tables; the C++ kernels of csrc/add_layer_norm_cpu.cpp do the rest.
The rows of words, positions and types take the places of residual, x and ts in residual LayerNorm,
which adds them in one pass over memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmtl_kernels.dropout.cpp import dropout
from fastmtl_kernels.layer_norm import cpp as layer_norm
from fastmtl_kernels.layer_norm.common import RowNorm


def forward(
    ids: tuple[Tensor, Tensor | None, Tensor | None],
    tables: tuple[Tensor, Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and z [N, d] of words' dtype, and mean and rstd [N] float32.

    ids and tables are in the order word, position, type; None for a missing table.
    """
    words = F.embedding(ids[0], tables[0])
    positions, types = (
        None if index is None or table is None else F.embedding(index, table)
        for index, table in zip(ids[1:], tables[1:], strict=True)
    )
    plain = call._replace(dropout_p=0.0)
    y, z, mean, rstd = layer_norm.forward(words, positions, types, weight, bias, None, None, plain)
    return y if seed is None else dropout(y, call.dropout_p, seed, out=y), z, mean, rstd


def backward(
    dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None, call: RowNorm
) -> tuple[Tensor, Tensor]:
    """Return dz [N, d] and the gradients of weight and bias.

    The gradients have the shapes that layer_norm.cpp.backward gives them.
    """
    dh = dy if seed is None else dropout(dy, call.dropout_p, seed)
    plain = call._replace(dropout_p=0.0)
    dz, _, sums = layer_norm.backward(dh, z, mean, rstd, weight, None, plain)
    return dz, sums
