"""The public operation for DeBERTa's disentangled attention over packed sequences.

It checks the arguments, selects an implementation and calls it.

    S[i, j] = Q[i] K[j]^T + Q[i] PK[row(i - j)]^T + K[j] PQ[row(i - j)]^T
    P = softmax(softmax_scale * S)       over the keys j of the query's own sequence
    O = (keep * P / (1 - dropout_p)) V   keep[query, key] drawn by a counter generator from `seed`

qkv [N, 3, heads, head_dim]; cu_seqlens [B + 1]; PK (pos_key) and PQ (pos_query) [G, R, heads,
head_dim]. fastmtl_kernels.disentangled_attention.reference defines every value.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmtl_kernels.checks import check_dropout, describe
from fastmtl_kernels.disentangled_attention import cpp, padded, reference
from fastmtl_kernels.dispatch import select
from fastmtl_kernels.varlen_attention.plan import check_cu_seqlens

DisentangledImpl = Literal["auto", "reference", "cpp", "padded"]


def disentangled_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    position_rows: Tensor,
    *,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    group_offsets: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: DisentangledImpl = "auto",
) -> Tensor:
    """Return the attention of every token over its own sequence.

    The result is differentiable in qkv, pos_key and pos_query. A place is the index of a token in
    its sequence.

    Args:
        qkv: [N, 3, heads, head_dim], floating point, any strides. Rows past cu_seqlens[-1] belong
            to no sequence: output and gradient are zero there, whatever qkv contains.
        cu_seqlens: [B + 1] int32 on qkv's device, ascending from 0 to at most N; sequences may be
            empty.
        position_rows: [2 L - 1] int32 on qkv's device, L at least the length of the longest
            sequence: the tables' row in [0, R) for the distances 1 - L to L - 1 from the place of
            the key to that of the query. `buckets.position_rows` makes those of DeBERTa-v2.
        pos_key: [G, R, heads, head_dim], the keys of relative positions for the term content to
            position, converted to qkv's dtype; any strides. None for no such term.
        pos_query: the same for the term position to content. One of the two is needed.
        group_offsets: [G + 1] int32 on qkv's device, ascending from 0 to B: sequences
            group_offsets[g]:group_offsets[g + 1] use pos_key[g] and pos_query[g], so that tables
            repeated for each task get a gradient per task. None where G is 1.
        softmax_scale: the factor of the scores; None means (head_dim * terms) ** -0.5, with two
            terms for one table and three for both.
        dropout_p: the probability of dropping an entry of P, in [0, 1).
        seed: int64 of one element on qkv's device; needed where dropout_p > 0. Equal seeds drop
            equal entries, those that varlen_attention drops.
        impl: "auto", "reference" (plain torch text by text, reads offsets on the host), "cpp" (CPU
            tensors) or "padded" (plain torch on padded texts, waits for no device).

    Returns:
        [N, heads, head_dim] of qkv's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.
            "padded" cannot read the values of offsets and rows, and does not check them.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    _check(qkv, cu_seqlens, position_rows, softmax_scale)
    _check_tables(qkv, pos_key, pos_query, group_offsets)
    check_dropout(dropout_p, seed, qkv.device)
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    scale = (qkv.shape[-1] * terms) ** -0.5 if softmax_scale is None else softmax_scale
    pos_key, pos_query = (None if table is None else table.to(qkv.dtype) for table in (pos_key, pos_query))
    chosen = select("disentangled_attention", impl, qkv)
    if chosen == "padded":
        return padded.disentangled_attention(
            qkv, cu_seqlens, position_rows, pos_key, pos_query, group_offsets, scale, dropout_p, seed
        )
    offsets = cu_seqlens.tolist()
    check_cu_seqlens(offsets, qkv.shape[0])
    groups = [0, len(offsets) - 1] if group_offsets is None else group_offsets.tolist()
    _check_values(offsets, groups, position_rows, [t for t in (pos_key, pos_query) if t is not None][0].shape[1])
    if chosen == "cpp":
        return cpp.disentangled_attention(
            qkv, cu_seqlens, position_rows, pos_key, pos_query, group_offsets, scale, dropout_p, seed
        )
    return reference.disentangled_attention(
        qkv, offsets, position_rows, pos_key, pos_query, groups, scale, dropout_p, seed
    )


def _check(qkv: Tensor, cu_seqlens: Tensor, position_rows: Tensor, softmax_scale: float | None) -> None:
    """Check types, shapes, dtypes and devices, without reading a tensor.

    Raises:
        ValueError: names the wrong argument.
    """
    if not isinstance(qkv, Tensor) or qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point of shape [N, 3, heads, head_dim], got {describe(qkv)}")
    if qkv.shape[2] == 0 or qkv.shape[3] == 0:
        raise ValueError(f"qkv must have at least one head and head_dim >= 1, got {describe(qkv)}")
    _check_int32("cu_seqlens", cu_seqlens, "[B + 1]", qkv)
    _check_int32("position_rows", position_rows, "[2 L - 1]", qkv, smallest=0)
    if softmax_scale is not None and not float("-inf") < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be finite, or None for the default, got {softmax_scale}")


def _check_int32(name: str, tensor: Tensor, shape: str, qkv: Tensor, smallest: int = 1) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or len(tensor) < smallest or tensor.dtype != torch.int32:
        raise ValueError(f"{name} must be an int32 tensor of shape {shape}, got {describe(tensor)}")
    if tensor.device != qkv.device:
        raise ValueError(f"{name} must be on {qkv.device} like qkv, got {tensor.device}")


def _check_tables(qkv: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, group_offsets: Tensor | None) -> None:
    """Check the tables of relative positions and their groups, as `_check` does."""
    tables = {name: t for name, t in (("pos_key", pos_key), ("pos_query", pos_query)) if t is not None}
    if not tables:
        raise ValueError("pos_key or pos_query must be given: without both, use varlen_attention")
    first = next(iter(tables.values()))
    for name, table in tables.items():
        heads, head_dim = qkv.shape[2:]
        if not isinstance(table, Tensor) or table.dim() != 4 or not table.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape [G, R, {heads}, {head_dim}], got {describe(table)}"
            )
        if table.shape[2:] != qkv.shape[2:] or table.shape[0] == 0 or table.shape[:2] != first.shape[:2]:
            expected = "G >= 1 like pos_key" if len(tables) == 2 else "G >= 1"
            raise ValueError(
                f"{name} must have the shape [G, R, {heads}, {head_dim}] with {expected}, got {describe(table)}"
            )
        if table.device != qkv.device:
            raise ValueError(f"{name} must be on {qkv.device} like qkv, got {table.device}")
    if group_offsets is None:
        if len(first) > 1:
            raise ValueError(f"group_offsets must be given for tables of {len(first)} groups, got None")
        return
    _check_int32("group_offsets", group_offsets, "[G + 1]", qkv)
    if len(group_offsets) != len(first) + 1:
        raise ValueError(f"group_offsets must have {len(first) + 1} elements, got {describe(group_offsets)}")


def _check_values(offsets: list[int], groups: list[int], position_rows: Tensor, num_rows: int) -> None:
    """Check values on the host: those of group_offsets and of position_rows."""
    if groups[0] != 0 or groups != sorted(groups) or groups[-1] != len(offsets) - 1:
        raise ValueError(f"group_offsets must ascend from 0 to the {len(offsets) - 1} sequences, got {groups}")
    longest = max((stop - start for start, stop in zip(offsets, offsets[1:], strict=False)), default=0)
    if len(position_rows) < 2 * longest - 1:
        raise ValueError(
            f"position_rows must have at least {2 * longest - 1} rows for a sequence of {longest} tokens, "
            f"got {len(position_rows)}"
        )
    if len(position_rows) and not 0 <= int(position_rows.min()) <= int(position_rows.max()) < num_rows:
        low, high = int(position_rows.min()), int(position_rows.max())
        raise ValueError(f"position_rows must be in [0, {num_rows}), the rows of the tables, got {low} to {high}")
