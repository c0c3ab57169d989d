"""dropout with a counter-based generator, compared with F.dropout."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Work, ours, plain
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl_kernels import dropout as drop

# Least probability of the benchmark. With probability 0, dropout would only return its input.
LEAST = 0.1


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    tokens, width = rows.tokens, size.shape.hidden

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return drop(t["x"], dropout, rows.seed, impl=impl)  # type: ignore[arg-type]

        return run

    def eager(t: Tensors, dropout: float) -> Tensor:
        return F.dropout(t["x"], dropout)

    numbers = tokens * width
    work = Work(2 * numbers * rows.dtype.itemsize, numbers)
    return [
        Case(
            "dropout",
            f"{rows.about}, {width} columns",
            {"x": rows.randn(tokens, width)},
            fastmtl("reference"),
            [*ours(rows.device, "dropout", fastmtl), *plain(eager)],
            {"forward": work, "backward": work},
            rows.randn(tokens, width),
            ("x",),
            size.dropout or LEAST,
            tokens,
        )
    ]
