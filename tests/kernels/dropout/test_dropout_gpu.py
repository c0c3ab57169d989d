"""The Triton kernels of dropout on a GPU, against the oracle: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from row_cases import DTYPES, nan_filled

from fastmtl_kernels import dropout
from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.philox import keep_mask

NO_GPU = unsupported_reason("dropout", "triton", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (8192, 768), (37, 3072), (5, 1100)])
def test_dropout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype).requires_grad_()
    key = torch.tensor([-(2**45) + 1], device="cuda")
    y = nan_filled(lambda: dropout(x, 0.1, key))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    keep, scale = keep_mask(key, *shape, 0.1), torch.tensor(1 / 0.9, dtype=torch.float32, device="cuda")
    assert torch.equal(y, torch.where(keep, x.float() * scale, 0.0).to(dtype))
    assert torch.equal(dx, torch.where(keep, scale, 0.0).to(dtype))


def test_a_captured_graph_draws_from_the_seed_of_each_replay() -> None:
    x, seed = torch.ones(64, 384, device="cuda"), torch.tensor([1], device="cuda")
    dropout(x, 0.5, seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout(x, 0.5, seed)
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y != 0, keep_mask(seed, 64, 384, 0.5))
