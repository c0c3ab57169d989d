"""combine: the weighted sum of an encoder's task gradients, compared with one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.bench.ops.case import Case, Run, Tensors, Work, ours, plain
from fastmtl.bench.ops.gramian import task_gradients
from fastmtl.bench.sizes import Size
from fastmtl_kernels import combine


def cases(size: Size) -> list[Case]:
    grads = task_gradients(size)
    tasks, columns = grads.shape
    weights = torch.linspace(-1, 1, tasks, device=grads.device).to(grads.dtype)
    out = torch.empty_like(grads[0])

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, _: float) -> Tensor:
            merged = combine(t["grads"], weights, out, impl)  # type: ignore[arg-type]
            assert isinstance(merged, Tensor)
            return merged

        return run

    def oracle(t: Tensors, _: float) -> Tensor:
        merged = combine(t["grads"], weights, None, "reference")
        assert isinstance(merged, Tensor)
        return merged

    def eager(t: Tensors, _: float) -> Tensor:
        return torch.mv(t["grads"].T, weights, out=out)

    return [
        Case(
            "combine",
            f"{tasks} tasks x {columns:,} numbers",
            {"grads": grads},
            oracle,
            [*ours(grads.device, "combine", fastmtl), *plain(eager)],
            {"forward": Work((tasks + 1) * out.nbytes, 2 * tasks * columns)},
            exact=True,
        )
    ]
