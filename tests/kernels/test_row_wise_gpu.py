"""The Triton kernels of the row-wise operations on a GPU, against the oracles: outputs and gradients."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import add_layer_norm_cases as add_layer_norm  # noqa: E402
import embed_layer_norm_cases as embed_layer_norm  # noqa: E402
import pool_cases as pool  # noqa: E402
import row_cases  # noqa: E402

from fastmtl_kernels.dispatch import unsupported_reason  # noqa: E402
from fastmtl_kernels.dropout.api import dropout  # noqa: E402
from fastmtl_kernels.philox import keep_mask  # noqa: E402

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else unsupported_reason("triton", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]
any_shape = settings(max_examples=60, deadline=None)
# Few widths: each is a compilation.
WIDTHS = [1, 33, 384, 768]


@any_shape
@given(case=add_layer_norm.cases(max_rows=700), columns=st.sampled_from(WIDTHS))
def test_add_layer_norm(case: add_layer_norm.Case, columns: int) -> None:
    add_layer_norm.check(replace(case, columns=columns), "triton", "cuda")


@any_shape
@given(case=embed_layer_norm.cases(max_rows=700), columns=st.sampled_from(WIDTHS))
def test_embed_layer_norm(case: embed_layer_norm.Case, columns: int) -> None:
    embed_layer_norm.check(replace(case, columns=columns), "triton", "cuda")


@any_shape
@given(case=pool.cases(max_length=512), columns=st.sampled_from(WIDTHS))
def test_pool(case: pool.Case, columns: int) -> None:
    pool.check(replace(case, columns=columns), "triton", "cuda")


@pytest.mark.parametrize("dtype", row_cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (8192, 768), (37, 3072), (5, 1100)])
def test_dropout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype).requires_grad_()
    key = torch.tensor([-(2**45) + 1], device="cuda")
    y = row_cases.nan_filled(lambda: dropout(x, 0.1, key))
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
