"""geglu, gelu of one half of each row times the other half, compared with torch's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Work, ours, plain
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl_kernels import geglu


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    # ModernBERT's inner size: 1.5 times the hidden size.
    tokens, width = rows.tokens, size.shape.hidden * 3 // 2

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, _: float) -> Tensor:
            return geglu(t["x"], impl=impl)  # type: ignore[arg-type]

        return run

    matrix = tokens * width * rows.dtype.itemsize
    return [
        Case(
            "geglu",
            f"{rows.about}, {width} columns of 2 x {width}",
            {"x": rows.randn(tokens, 2 * width)},
            fastmtl("reference"),
            [*ours(rows.device, "geglu", fastmtl), *plain(_eager)],
            # Forward reads x and writes y. Backward reads x and y's gradient, and writes that of x.
            {"forward": Work(3 * matrix, 25 * tokens * width), "backward": Work(5 * matrix, 45 * tokens * width)},
            rows.randn(tokens, width),
            ("x",),
            tokens=tokens,
        )
    ]


def _eager(t: Tensors, _: float) -> Tensor:
    a, b = t["x"].chunk(2, -1)
    return F.gelu(a) * b
