"""embed_layer_norm: summed rows of three tables, LayerNorm and dropout, compared with torch's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Work, ours, plain
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl_kernels import embed_layer_norm

EPS = 1e-12
TYPES = 2


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    tokens, shape, width = rows.tokens, size.shape, size.shape.hidden
    positions = torch.cat([torch.arange(length, device=rows.device) for length in rows.lengths])
    ids = {"input_ids": rows.ids(shape.vocabulary), "position_ids": positions, "token_type_ids": rows.ids(TYPES)}

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return embed_layer_norm(**ids, **t, dropout_p=dropout, eps=EPS, seed=rows.seed, impl=impl)  # type: ignore[arg-type]

        return run

    def eager(t: Tensors, dropout: float) -> Tensor:
        z = F.embedding(ids["input_ids"], t["words"]) + F.embedding(ids["position_ids"], t["positions"])
        z = z + F.embedding(ids["token_type_ids"], t["types"])
        return F.dropout(F.layer_norm(z, z.shape[1:], t["weight"], t["bias"], EPS), dropout)

    heights = {"words": shape.vocabulary, "positions": shape.positions, "types": TYPES}
    tensors = {name: rows.randn(height, width) for name, height in heights.items()}
    tensors.update(weight=rows.randn(width), bias=rows.randn(width))
    matrix, tables = (height * width * rows.dtype.itemsize for height in (tokens, sum(heights.values())))
    return [
        Case(
            "embed_layer_norm",
            f"{rows.about}, {width} columns, {shape.vocabulary:,} words",
            tensors,
            fastmtl("reference"),
            [*ours(rows.device, "embed_layer_norm", fastmtl), *plain(eager)],
            {
                # Forward reads a row of the word table for each token, and writes y and the tensors
                # that backward needs. Backward reads those tensors and the gradient of y, and
                # writes the dense gradients of the tables.
                "forward": Work(3 * matrix, 9 * tokens * width),
                "backward": Work(2 * matrix + tables, 14 * tokens * width),
            },
            rows.randn(tokens, width),
            tuple(tensors),
            size.dropout,
            tokens,
        )
    ]
