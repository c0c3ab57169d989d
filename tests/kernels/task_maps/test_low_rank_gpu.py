"""low_rank and pal by their Triton kernels on a GPU, against the oracles: outputs and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import low_rank_cases
import pal_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtl_kernels.dispatch import MAX_RANK, unsupported_reason
from fastmtl_kernels.task_maps.low_rank import low_rank
from fastmtl_kernels.task_maps.pal import pal
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

NO_GPU = unsupported_reason("low_rank", "triton", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]
few_shapes = settings(max_examples=30, deadline=None)
# Few sizes: each is a compilation.
WIDTHS = st.sampled_from([33, 384, 768])


@few_shapes
@given(case=low_rank_cases.cases(max_rows=700), columns=WIDTHS, rank=st.sampled_from([1, 8, 64, 204, 256]))
def test_low_rank(case: low_rank_cases.Case, columns: int, rank: int) -> None:
    low_rank_cases.check(replace(case, columns=columns, rank=min(rank, MAX_RANK[case.dtype])), "triton", "cuda")


@few_shapes
@given(
    case=pal_cases.cases(max_length=300),
    columns=WIDTHS,
    heads=st.sampled_from([(1, 12), (12, 17), (6, 34), (4, 64)]),
)
def test_pal(case: pal_cases.Case, columns: int, heads: tuple[int, int]) -> None:
    if heads[0] * heads[1] > MAX_RANK[case.dtype]:
        heads = (1, heads[1])
    case = replace(case, columns=columns, num_heads=heads[0], head_dim=heads[1])
    pal_cases.check(case, "triton", "cuda")


def test_torch_on_a_gpu() -> None:
    case = low_rank_cases.Case(
        sizes=(20, 0, 1, 50), tail=3, columns=37, rank=6, dtype=torch.float32, layout="columns", transposed=True,
        down_bias=True, up_bias=True, activation="gelu", rates=(0.3, 0.1, 0.0, 0.5), seed=5,
    )  # fmt: skip
    low_rank_cases.check(case, "torch", "cuda")


def test_a_rank_that_is_too_wide() -> None:
    offsets = torch.tensor([0, 9], dtype=torch.int32, device="cuda")
    for dtype, widest in MAX_RANK.items():
        shapes = ((9, 300), (1, 300, widest + 1), (1, widest + 1, 300))
        x, down, up = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
        with pytest.raises(
            ValueError, match=f"^down must have a rank of at most {widest} in {dtype} for impl='triton'"
        ):
            low_rank(x, down, up, offsets, impl="triton")
        assert torch.equal(low_rank(x, down, up, offsets), low_rank(x, down, up, offsets, impl="torch"))


@pytest.mark.parametrize("name", ["low_rank", "pal"])
def test_a_graph_serves_other_offsets_and_seeds(name: str) -> None:
    """Nothing waits for the GPU: offsets and seed are read when the graph is replayed."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(256, 96, device="cuda", generator=generator)
    down, up = (torch.randn(s, device="cuda", generator=generator) for s in ((2, 96, 24), (2, 24, 96)))
    qkv = torch.randn(2, 24, 72, device="cuda", generator=generator)
    offsets, cu_seqlens = (torch.tensor(v, dtype=torch.int32, device="cuda") for v in ([0, 100, 250], [0, 250]))
    seed = torch.tensor([1], device="cuda")
    plan = AttentionPlan.make([0, 60, 250], 256, "cuda")
    leaves = [leaf.requires_grad_() for leaf in (x, down, up)]

    def step() -> tuple[Any, ...]:
        if name == "low_rank":
            y = low_rank(x, down, up, offsets, dropout_p=(0.1, 0.3), seed=seed, impl="triton")
        else:
            y = pal(
                x, down, qkv, up, cu_seqlens, offsets, num_heads=2, dropout_p=0.1, out_dropout_p=(0.1, 0.3), seed=seed,
                impl="triton", plan=plan,
            )  # fmt: skip
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    cases = [((0, 100, 250), 1), ((0, 0, 250), 2), ((0, 250, 250), 3)]
    expected = []
    for values, number in cases:
        offsets.copy_(torch.tensor(values))
        seed.fill_(number)
        expected.append(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for (values, number), eager in zip(cases, expected, strict=True):
        offsets.copy_(torch.tensor(values))
        seed.fill_(number)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
