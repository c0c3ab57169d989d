"""add_layer_norm, LN(residual + dropout(x)), compared with F.layer_norm and Liger's kernel."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Way, Work, ours, plain
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl.measure.harness import Skipped
from fastmtl_kernels import add_layer_norm

EPS = 1e-12
PARAMETERS = ("weight", "bias")


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    tokens, width = rows.tokens, size.shape.hidden

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return add_layer_norm(**t, dropout_p=dropout, eps=EPS, seed=rows.seed, impl=impl)  # type: ignore[arg-type]

        return run

    tensors = {name: rows.randn(tokens, width) for name in ("residual", "x")}
    tensors.update({name: rows.randn(width) for name in PARAMETERS})
    matrix = tokens * width * rows.dtype.itemsize
    return [
        Case(
            "add_layer_norm",
            f"{rows.about}, {width} columns",
            tensors,
            fastmtl("reference"),
            [*ours(rows.device, "add_layer_norm", fastmtl), *plain(_eager), Way("liger", lambda: _liger(rows))],
            {
                # Forward reads x and the residual, and writes y and the tensors that backward
                # needs. Backward reads those tensors and the gradient of y, and writes the
                # gradients of x and the residual, which are one without dropout.
                "forward": Work(4 * matrix, 9 * tokens * width),
                "backward": Work((4 if size.dropout else 3) * matrix, 14 * tokens * width),
            },
            rows.randn(tokens, width),
            tuple(tensors),
            size.dropout,
            tokens,
        )
    ]


def _eager(t: Tensors, dropout: float) -> Tensor:
    z = t["residual"] + F.dropout(t["x"], dropout)
    return F.layer_norm(z, z.shape[1:], t["weight"], t["bias"], EPS)


def _liger(rows: Rows) -> Run:
    if rows.device.type != "cuda":
        raise Skipped("Liger's kernels are Triton's and need a GPU")
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        raise Skipped(f"{error}: pip install 'fastmtl-torch[bench]'") from None

    def run(t: Tensors, dropout: float) -> Tensor:
        z = t["residual"] + F.dropout(t["x"], dropout)
        found: Tensor = LigerLayerNormFunction.apply(z, t["weight"], t["bias"], EPS)
        return found

    return run
