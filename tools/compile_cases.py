"""Calls on meta tensors whose Triton kernels docs/compile-table.md lists.

The launchers choose blocks, warps and stages; the calls here lead to each of their choices. Each
block shape is called with one size, or with several if models in use have several: the widths of
BERTs from tiny to large, their head sizes and those of projected attention layers, ranks up to the
largest. The optional parts of a kernel are called all off and all on, and for one width also one at
a time. float16 shares the choices of bfloat16, so it has fewer sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmtl_kernels.add_layer_norm import triton as add_layer_norm_triton
from fastmtl_kernels.combined_adamw import triton as combined_adamw_triton
from fastmtl_kernels.combined_adamw.reference import Update, Written
from fastmtl_kernels.dispatch import MAX_RANK
from fastmtl_kernels.dropout import triton as dropout_triton
from fastmtl_kernels.embed_layer_norm import triton as embed_layer_norm_triton
from fastmtl_kernels.geglu import triton as geglu_triton
from fastmtl_kernels.layer_norm.common import RowNorm
from fastmtl_kernels.pool import triton as pool_triton
from fastmtl_kernels.task_gradients import triton as gradients_triton
from fastmtl_kernels.task_maps.common import Maps, Wants
from fastmtl_kernels.task_maps.triton import launch as low_rank_triton
from fastmtl_kernels.task_sink import TaskRows
from fastmtl_kernels.varlen_attention.plan import AttentionPlan
from fastmtl_kernels.varlen_attention.triton import launch as varlen_attention_triton
from fastmtl_kernels.varlen_attention.triton import rotary as rotary_triton
from fastmtl_kernels.varlen_attention.triton.bias import Bias, BiasSums, bias_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = {torch.bfloat16: (128, 256, 384, 512, 768, 1024), torch.float32: (384, 768, 1024), torch.float16: (384, 768)}
HEAD_DIMS = {
    torch.bfloat16: (11, 16, 17, 32, 34, 64, 128),
    torch.float32: (11, 16, 17, 32, 34, 64),
    torch.float16: (34, 64, 128),
}
# One rank for each size to which the kernels pad ranks.
RANKS = {dtype: [2**n for n in range(4, 20) if 2**n <= widest] for dtype, widest in MAX_RANK.items()}
ROWS = 8192
SEQUENCES = 96


def with_widths() -> Iterator[tuple[torch.dtype, int]]:
    return ((dtype, width) for dtype, widths in WIDTHS.items() for width in widths)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def seed() -> Tensor:
    return meta(1, dtype=torch.int64)


def tasks(count: int = 3) -> TaskRows:
    return TaskRows(meta(count + 1, dtype=torch.int32), ROWS, None)


def add_layer_norm() -> None:
    parts: tuple[tuple[str, ...], ...] = (), ("ts", "dropout")
    cases = [(dtype, width, on) for dtype, width in with_widths() for on in parts]
    cases += [(torch.bfloat16, 768, on) for on in (("ts",), ("dropout",))]
    for dtype, width, on in cases:
        rows, column = meta(ROWS, width, dtype=dtype), meta(width, dtype=dtype)
        ts = rows if "ts" in on else None
        rate = 0.1 if "dropout" in on else 0.0
        call = RowNorm(add_layer_norm_triton, rate, 1e-12, tasks(), None, True)
        drawn = seed() if rate else None
        _, z, mean, rstd, _ = add_layer_norm_triton.forward(rows, rows, ts, column, column, drawn, call)
        for kept in (call, call._replace(sums_dtype=dtype)):  # sums for a sink are float32
            add_layer_norm_triton.backward(rows, z, mean, rstd, column, drawn, kept, dx_dtype=dtype, want_sums=True)
        add_layer_norm_triton.recompute(z, mean, rstd, column, column, call)


def add_layer_norm_in_part() -> None:
    """Call backward without gradients of x or parameters, or with x in a dtype of its own."""
    for dtype, width in ((torch.bfloat16, 384), (torch.bfloat16, 1024), (torch.float32, 1024)):
        rows, column, numbers = (
            meta(ROWS, width, dtype=dtype),
            meta(width, dtype=dtype),
            meta(ROWS, dtype=torch.float32),
        )
        call = RowNorm(add_layer_norm_triton, 0.1, 1e-12, tasks(), None, True)
        for drawn, x_dtype, sums in (
            (seed(), dtype, False),
            (seed(), None, True),
            (None, None, False),
            (None, torch.bfloat16 if dtype == torch.float32 else torch.float32, True),
        ):
            add_layer_norm_triton.backward(
                rows, rows, numbers, numbers, column, drawn, call, dx_dtype=x_dtype, want_sums=sums
            )


def pre_norm() -> None:
    """Call LayerNorm without bias, of a sum that is a result too and of its input, and of words."""
    for dtype in (torch.bfloat16, torch.float32):
        rows, column, ids = meta(ROWS, 768, dtype=dtype), meta(768, dtype=dtype), meta(ROWS, dtype=torch.int64)
        call = RowNorm(add_layer_norm_triton, 0.0, 1e-5, tasks(), None, True, returns_sum=True)
        _, z, mean, rstd, _ = add_layer_norm_triton.forward(rows, rows, None, column, None, None, call)
        add_layer_norm_triton.backward(
            rows, z, mean, rstd, column, None, call, dsum=rows, dx_dtype=dtype, want_sums=True
        )
        add_layer_norm_triton.recompute(z, mean, rstd, column, None, call)
        add_layer_norm_triton.forward(rows, None, None, column, None, None, call)
        words = meta(50368, 768, dtype=dtype)
        embed_layer_norm_triton.forward((ids, None, None), (words, None, None), column, None, None, call)


def geglu() -> None:
    sizes = [(dtype, width) for dtype in DTYPES for width in (1152, 2624)] + [(torch.bfloat16, 96)]
    for (dtype, width), approximate in itertools.product(sizes, ("none", "tanh")):
        x = meta(ROWS, 2 * width, dtype=dtype)
        geglu_triton.backward(geglu_triton.forward(x, approximate), x, approximate)


def embed_layer_norm() -> None:
    cases = [(dtype, width, 0.1) for dtype, width in with_widths()] + [(torch.bfloat16, 768, 0.0)]
    for dtype, width, rate in cases:
        ids, column = meta(ROWS, dtype=torch.int64), meta(width, dtype=dtype)
        tables = meta(30522, width, dtype=dtype), meta(512, width, dtype=dtype), meta(2, width, dtype=dtype)
        call = RowNorm(embed_layer_norm_triton, rate, 1e-12, tasks(), None, True)
        drawn = seed() if rate else None
        y, z, mean, rstd = embed_layer_norm_triton.forward((ids, ids, ids), tables, column, column, drawn, call)
        embed_layer_norm_triton.backward(y, z, mean, rstd, column, drawn, call)


def dropout() -> None:
    for dtype, width in (*with_widths(), (torch.bfloat16, 4096)):
        dropout_triton.dropout(meta(ROWS, width, dtype=dtype), 0.1, seed())


def pool() -> None:
    cu_seqlens = meta(SEQUENCES + 1, dtype=torch.int32)
    sizes = [(dtype, 768) for dtype in DTYPES] + [(torch.bfloat16, width) for width in (16, 32, 64)]
    for (dtype, width), mode in itertools.product(sizes, ("cls", "mean", "max")):
        out, winners = pool_triton.forward(meta(ROWS, width, dtype=dtype), cu_seqlens, mode)
        pool_triton.backward(out, cu_seqlens, winners, mode, ROWS)


def gradients() -> None:
    """Call combine and gramian for 1 to 64 tasks, with every alignment, and sizes beyond int32.

    combine writes results in J's dtype and in float32.
    """
    cases = list(itertools.product((*range(1, 9), 16, 64), (1 << 20,), (torch.float32, torch.bfloat16)))
    cases += [(3, 999_999, dtype) for dtype in DTYPES] + [(3, 2**31 + 8, torch.bfloat16), (8, 1 << 20, torch.float16)]
    for num_tasks, size, dtype in cases:
        rows = [[row] for row in meta(num_tasks, size, dtype=dtype)]
        for out_dtype in {dtype, torch.float32}:
            gradients_triton.combine(rows, meta(num_tasks, dtype=torch.float32), [meta(size, dtype=out_dtype)])
        if num_tasks <= gradients_triton.MAX_ROWS:
            gradients_triton.gramian(rows)


def combined_adamw() -> None:
    """Call combined_adamw for 1, 3 and 16 tasks, with and without a 16-bit copy, and for a table.

    1 task stands for parameters that have no task gradients.
    """
    cases: list[tuple[int, torch.dtype, torch.dtype | None]] = [(n, torch.float32, None) for n in (1, 3, 16)]
    cases += [(3, torch.bfloat16, None), (3, torch.float16, torch.float16), (3, torch.bfloat16, torch.bfloat16)]
    for num_tasks, dtype, copied in cases:
        _update(num_tasks, (1 << 20,), (1 << 20,), dtype, copied)
    for copied in (None, torch.bfloat16):
        _update(1, (30522, 384), (ROWS, 384), torch.float32, copied)


def _update(
    num_tasks: int, shape: tuple[int, ...], of_rows: tuple[int, ...], dtype: torch.dtype, copied: torch.dtype | None
) -> None:
    copy = None if copied is None else meta(*shape, dtype=copied)
    p, m, v = (meta(*shape, dtype=torch.float32) for _ in range(3))
    target = Written(p, m, v, copy)
    slots = None if len(shape) == 1 else meta(shape[0], dtype=torch.int32)
    rows, weights = [[meta(*of_rows, dtype=dtype)] for _ in range(num_tasks)], meta(num_tasks, dtype=torch.float32)
    update = Update.at(1, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    combined_adamw_triton.combined_adamw(rows, weights, [target], update, slots)


def attention() -> None:
    for dtype, sizes in HEAD_DIMS.items():
        for head_dim in sizes:
            _attention(dtype, 12, head_dim, 0.1)
    for dtype, head_dim in ((torch.float32, 32), (torch.float32, 64), (torch.bfloat16, 32), (torch.bfloat16, 64)):
        _attention(dtype, 12, head_dim, 0.0)
    # Triton makes a constant of 1 head, and knows that 16 heads are a multiple of 16.
    for num_heads in (1, 16):
        _attention(torch.bfloat16, num_heads, 64, 0.1)


def _attention(
    dtype: torch.dtype,
    num_heads: int,
    head_dim: int,
    rate: float,
    *,
    window: int | None = None,
    rotary: bool = False,
    groups: int = 0,
) -> None:
    """Run forward and backward on a batch with a short and a long sequence.

    groups: those of the bias; 0 for no bias.
    """
    plan = AttentionPlan.make([0, 20, 200], 208, "meta")
    qkv = meta(208, 3, num_heads, head_dim, dtype=dtype)
    drawn = seed() if rate else None
    table = meta(2, 512, head_dim // 2, dtype=torch.float32)
    bias = sums = None
    if rotary:
        qkv = rotary_triton.rotated(qkv, table, plan)
    if groups:
        rows = meta(groups + 1, dtype=torch.int32) if groups > 1 else None
        bias = Bias(meta(groups, num_heads, 1023, dtype=dtype), rows)
        sums = BiasSums.empty(bias, plan, num_heads)
    out, stats = varlen_attention_triton.forward(qkv, plan, 0.125, rate, drawn, window, bias)
    dout = torch.empty_like(out)
    dqkv = varlen_attention_triton.backward(qkv, out, stats, dout, plan, 0.125, rate, drawn, window, bias, sums)
    if rotary:
        rotary_triton.rotate_back(dqkv, table, plan)
    if bias is not None and sums is not None:
        bias_gradient(bias, sums, plan)


def attention_in_window() -> None:
    """Call attention with a window and rotary positions, for ModernBERT's window and a shorter one.

    Only a window of less than 63 changes the kernels of short sequences.
    """
    for dtype, window, rate in (
        *((dtype, 64, 0.1) for dtype in DTYPES),
        (torch.bfloat16, 64, 0.0),
        (torch.bfloat16, 16, 0.1),
    ):
        _attention(dtype, 12, 64, rate, window=window, rotary=True)


def attention_with_bias() -> None:
    """Call attention with a bias of one group or of several, for MPNet's heads."""
    for dtype in DTYPES:
        _attention(dtype, 12, 64, 0.1, groups=3)
    _attention(torch.bfloat16, 12, 64, 0.0, groups=1)
    _attention(torch.bfloat16, 12, 64, 0.1, window=64, rotary=True, groups=3)


def low_rank() -> None:
    """Call the two maps of low_rank and lora with and without biases, activation and dropout.

    Some ranks need padding, others do not.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for rank in RANKS[dtype]:
            _maps(dtype, 768, rank, 768, biases=False)
            _maps(dtype, 768, rank, 768, middle="gelu", rate=0.1)
    for rank in (1, 8, 31, 100, 204):
        _maps(torch.bfloat16, 768, rank, 768, rate=0.1)
    _maps(torch.float32, 768, 33, 768, rate=0.1)
    for rank in (16, MAX_RANK[torch.float16]):
        _maps(torch.float16, 768, rank, 768, middle="gelu", rate=0.1)
    _maps(torch.bfloat16, 768, 64, 768, middle="relu", rate=0.1)
    for width in (128, 384, 1024):
        _maps(torch.bfloat16, width, 8, width, rate=0.1)


def low_rank_of_many_tasks() -> None:
    """Call the maps for up to 200 tasks, since a kernel reads the offsets of all tasks at once."""
    for count, rank in ((1, 16), (40, 16), (200, 16), (200, MAX_RANK[torch.bfloat16])):
        _maps(torch.bfloat16, 768, rank, 768, middle="gelu", rate=0.1, num_tasks=count)


def low_rank_in_part() -> None:
    """Call the maps without backward, without a gradient of x, and with weights not transposed."""
    for rank in (16, MAX_RANK[torch.bfloat16]):
        _maps(torch.bfloat16, 768, rank, 768, saves=False)
        _maps(torch.bfloat16, 768, rank, 768, wants=Wants(False, True, True, True, True))
        _maps(torch.bfloat16, 768, rank, 768, transposed=False, rate=0.1)


def pal() -> None:
    """Call the maps of pal: down, to queries, keys and values, and up.

    `attention` covers the attention between them.
    """
    sizes = [(torch.bfloat16, size) for size in (12, 24, 48, 96, 204)]
    sizes += [(torch.float32, size) for size in (12, 24, 48)]
    for dtype, size in (*sizes, (torch.float16, 204)):
        _maps(dtype, None, size, 768, last="gelu", rate=0.1)
    for dtype, size in ((torch.float32, 48), (torch.bfloat16, 12), (torch.bfloat16, 204)):
        _maps(dtype, 768, size, 3 * size)
        _maps(dtype, None, size, 768, biases=False)
    _maps(torch.bfloat16, None, 204, 768, last="relu", rate=0.1)


def _maps(
    dtype: torch.dtype,
    d_in: int | None,
    rank: int,
    d_out: int,
    *,
    biases: bool = True,
    middle: str = "identity",
    last: str = "identity",
    rate: float = 0.0,
    num_tasks: int = 3,
    saves: bool = True,
    wants: Wants | None = None,
    transposed: bool = True,
) -> None:
    """Run forward and backward of two maps, d_in to rank to d_out.

    d_in: None leaves out the first map. transposed: store weights as torch's linear layers do.
    saves: False for a forward without backward.
    """

    def weight(rows: int, columns: int) -> Tensor:
        shape = (num_tasks, columns, rows) if transposed else (num_tasks, rows, columns)
        return meta(*shape, dtype=dtype).mT if transposed else meta(*shape, dtype=dtype)

    call = Maps(low_rank_triton, tasks(num_tasks), middle, last, (rate,) * num_tasks, saves)
    x = meta(ROWS, d_in or rank, dtype=dtype)
    first, second = weight(d_in, rank) if d_in else None, weight(rank, d_out)
    first_bias = meta(num_tasks, rank, dtype=dtype) if d_in and biases else None
    second_bias = meta(num_tasks, d_out, dtype=dtype) if biases else None
    drawn = seed() if rate else None
    y, h = low_rank_triton.forward(x, first, first_bias, second, second_bias, drawn, call)
    if not saves:
        return
    assert y is not None
    asked = wants or Wants(True, first is not None, first_bias is not None, True, biases)
    low_rank_triton.backward(y, x, first, second, second_bias, drawn, h, call=call, wants=asked)


CASES = (
    add_layer_norm,
    add_layer_norm_in_part,
    pre_norm,
    embed_layer_norm,
    dropout,
    pool,
    geglu,
    gradients,
    combined_adamw,
    attention,
    attention_in_window,
    attention_with_bias,
    low_rank,
    low_rank_of_many_tasks,
    low_rank_in_part,
    pal,
)
