"""The embeddings of a BERT by Triton.

    z = words[input_ids] + positions[position_ids] + types[token_type_ids]
    y = dropout((z - mean(z)) / sqrt(var(z) + eps) * weight + bias)

ids int32 or int64 [num_rows]; tables [rows, D] contiguous, each float32, float16 or bfloat16; y, z
[num_rows, D]. positions, types and bias may be None. Arithmetic in float32. Backward applies the
dropout mask to dy, then runs fastmtl_kernels.layer_norm.triton.

Source: see fastmtl_kernels.embed_layer_norm.reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.dropout.triton import keep_rows
from fastmtl_kernels.layer_norm import triton as layer_norm
from fastmtl_kernels.layer_norm.common import RowNorm
from fastmtl_kernels.layer_norm.triton import normalise
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.row_blocks import block_shape, load_rows


@triton.jit(
    do_not_specialize=["num_rows", "num_tasks", "threshold"],
    do_not_specialize_on_alignment=[
        "input_ids_ptr", "position_ids_ptr", "token_type_ids_ptr", "seed_ptr", "token_offsets_ptr", "mean_ptr",
        "rstd_ptr",
    ],
)  # fmt: skip
def _embed_layer_norm_fwd_kernel(
    input_ids_ptr: tl.tensor,
    position_ids_ptr: tl.tensor,
    token_type_ids_ptr: tl.tensor,
    words_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    types_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    y_ptr: tl.tensor,
    z_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_TYPES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.load(token_offsets_ptr + num_tasks)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    word = tl.load(input_ids_ptr + rows, mask=mask_m, other=0).to(tl.int64)
    z = load_rows(words_ptr, word[:, None] * D + offs_d[None, :], mask)
    if HAS_POSITIONS:
        position = tl.load(position_ids_ptr + rows, mask=mask_m, other=0).to(tl.int64)
        z += load_rows(positions_ptr, position[:, None] * D + offs_d[None, :], mask)
    if HAS_TYPES:
        kind = tl.load(token_type_ids_ptr + rows, mask=mask_m, other=0).to(tl.int64)
        z += load_rows(types_ptr, kind[:, None] * D + offs_d[None, :], mask)
    tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
    z = z.to(z_ptr.dtype.element_ty).to(tl.float32)
    y, mean, rstd = normalise(z, weight_ptr, bias_ptr, eps, D, BLOCK_D, HAS_BIAS)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    if DROPOUT:
        y = tl.where(keep_rows(seed_ptr, rows, 0, threshold, BLOCK_D), y * keep_scale, 0.0)
    y = tl.where(mask_m[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, y, mask=(rows < num_rows)[:, None] & mask_d[None, :])


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
    num_rows, num_columns, words = ids[0].shape[0], tables[0].shape[1], tables[0]
    y, z = (torch.empty(num_rows, num_columns, dtype=words.dtype, device=words.device) for _ in range(2))
    mean, rstd = torch.empty(2, num_rows, dtype=torch.float32, device=words.device)
    shape = block_shape(num_columns)
    if num_rows:
        with torch.cuda.device_of(words):
            _embed_layer_norm_fwd_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
                input_ids_ptr=ids[0].contiguous(),
                position_ids_ptr=_contiguous(ids[1]),
                token_type_ids_ptr=_contiguous(ids[2]),
                words_ptr=tables[0].contiguous(),
                positions_ptr=_contiguous(tables[1]),
                types_ptr=_contiguous(tables[2]),
                weight_ptr=weight.contiguous(),
                bias_ptr=_contiguous(bias),
                seed_ptr=seed,
                token_offsets_ptr=call.tasks.offsets,
                y_ptr=y,
                z_ptr=z,
                mean_ptr=mean,
                rstd_ptr=rstd,
                num_rows=num_rows,
                num_tasks=call.tasks.num_tasks,
                threshold=keep_threshold(call.dropout_p),
                keep_scale=1 / (1 - call.dropout_p),
                eps=call.eps,
                D=num_columns,
                HAS_POSITIONS=tables[1] is not None,
                HAS_TYPES=tables[2] is not None,
                HAS_BIAS=bias is not None,
                DROPOUT=seed is not None,
                **shape,
            )
    return y, z, mean, rstd


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def backward(
    dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None, call: RowNorm
) -> tuple[Tensor, Tensor]:
    """Return dz [N, d] and the gradients of weight and bias.

    The gradients have the shapes and dtypes that layer_norm.triton.backward gives them.
    """
    dz, _, sums = layer_norm.backward(dy, z, mean, rstd, weight, seed, call, dx_dtype=None, want_sums=True, drop_y=True)
    return dz, sums
