"""pool: one vector per sequence, compared with torch.segment_reduce and masks on padded rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.bench.ops.case import Case, Run, Tensors, Way, Work, ours, plain
from fastmtl.bench.ops.layout import Padded
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl_kernels import pool

MODES = ("cls", "mean", "max")


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    return [_case(mode, rows) for mode in MODES]


def _case(mode: str, rows: Rows) -> Case:
    tokens, sequences, width = rows.tokens, len(rows.lengths), rows.size.shape.hidden
    firsts, lengths = rows.cu_seqlens[:-1].long(), rows.cu_seqlens.diff().long()

    def fastmtl(impl: str) -> Run:
        return lambda t, _: pool(t["x"], rows.cu_seqlens, mode=mode, impl=impl)  # type: ignore[arg-type]

    def eager(t: Tensors, _: float) -> Tensor:
        return t["x"][firsts] if mode == "cls" else torch.segment_reduce(t["x"], mode, lengths=lengths)

    x = rows.randn(tokens, width)
    # In each sequence one row has the maximum of every column by far. Equal maxima, common with 8
    # bits, would share their gradient in segment_reduce.
    x[firsts + lengths // 2] += 8
    numbers, out = tokens * width, sequences * width
    work = Work((out + (out if mode == "cls" else numbers)) * rows.dtype.itemsize, numbers)
    layout = rows.padded({"x"})
    return Case(
        f"pool {mode}",
        f"{rows.about}, {width} columns",
        {"x": x},
        fastmtl("reference"),
        [*ours(rows.device, "pool", fastmtl), *plain(eager), Way("padded", lambda: _padded(mode, layout), layout)],
        {"forward": work, "backward": Work((out + numbers) * rows.dtype.itemsize, numbers)},
        rows.randn(sequences, width),
        ("x",),
        0.0,
        tokens,
    )


def _padded(mode: str, layout: Padded) -> Run:
    mask = layout.mask[..., None]

    def run(t: Tensors, _: float) -> Tensor:
        x = t["x"]
        if mode == "cls":
            return x[:, 0]
        if mode == "mean":
            return (x * mask).sum(1) / mask.sum(1)
        return x.masked_fill(~mask, float("-inf")).max(1).values

    return run
