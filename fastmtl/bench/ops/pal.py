"""pal: projected attention layers of all tasks at once, compared with a loop over the tasks.

The loop uses torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Work, ours, plain
from fastmtl.bench.ops.layout import Padded
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl_kernels import pal
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

# The paper's sizes for BERT-base.
SIZE, HEADS = 204, 12


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    tokens, tasks, width = rows.tokens, size.tasks, size.shape.hidden
    plan, offsets = AttentionPlan.make(rows.offsets, tokens, rows.device), rows.token_offsets

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return pal(
                t["x"],
                t["down"],
                t["qkv"],
                t["up"],
                rows.cu_seqlens,
                offsets,
                num_heads=HEADS,
                dropout_p=dropout,
                seed=rows.seed,
                impl=impl,  # type: ignore[arg-type]
                plan=plan,
            )

        return run

    tensors = {
        "x": rows.randn(tokens, width),
        "down": rows.randn(tasks, width, SIZE, scale=width**-0.5),
        "qkv": rows.randn(tasks, SIZE, 3 * SIZE, scale=SIZE**-0.5),
        "up": rows.randn(tasks, SIZE, width, scale=SIZE**-0.5),
    }
    layout = rows.padded({"x", "output"})
    weights = sum(tensor.nbytes for name, tensor in tensors.items() if name != "x")
    matrix, narrow = (tokens * columns * rows.dtype.itemsize for columns in (width, SIZE))
    maps = 2 * tokens * (2 * width * SIZE + 3 * SIZE**2)
    product = 2 * sum(length**2 for length in rows.lengths) * SIZE
    return [
        Case(
            "pal",
            f"{rows.about} of {tasks} tasks, {width} columns, size {SIZE}, {HEADS} heads",
            tensors,
            fastmtl("reference"),
            [*ours(rows.device, "pal", fastmtl), *plain(_loop(rows, layout), layout)],
            {
                # Forward reads x, and writes y and the tensors for backward: the narrow rows, Q, K
                # and V, and attention's output.
                "forward": Work(2 * matrix + 5 * narrow + weights, maps + 2 * product),
                "backward": Work(3 * matrix + 10 * narrow + 2 * weights, 2 * maps + 5 * product),
            },
            rows.randn(tokens, width),
            tuple(tensors),
            size.dropout,
            tokens,
        )
    ]


def _loop(rows: Rows, layout: Padded) -> Run:
    def run(t: Tensors, dropout: float) -> Tensor:
        parts = []
        for task, (start, stop) in enumerate(pairwise(rows.task_sequences)):
            projected = t["x"][start:stop] @ t["down"][task] @ t["qkv"][task]
            q, k, v = projected.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            mask = layout.mask[start:stop, None, None]
            z = F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
            parts.append(z @ t["up"][task])
        return torch.cat(parts)

    return run
