"""gramian and combine against a memory copy of the same number of bytes: `make bench`.

The size is BERT-base with three tasks. gramian reads T P numbers, combine reads T P and writes P; each has beside it a
copy that reads and writes as many in all. The copy's time over the operation's is the share of the memory's speed.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastmtl_kernels import combine, gramian, implementations

NUM_TASKS, NUM_COLUMNS = 3, 110_000_000
IMPLS = [impl.impl for impl in implementations()["gramian"] if impl.available]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def grads(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(NUM_TASKS, NUM_COLUMNS).to(request.param)


def copy_of(num_elements: int, grads: Tensor, benchmark: BenchmarkFixture) -> None:
    source = grads.view(-1)[: num_elements // 2]
    target = torch.zeros_like(source)
    benchmark.pedantic(target.copy_, args=(source,), rounds=7, warmup_rounds=1)


@pytest.mark.benchmark(group="gramian")
def bench_gramian_copy(grads: Tensor, benchmark: BenchmarkFixture) -> None:
    copy_of(NUM_TASKS * NUM_COLUMNS, grads, benchmark)


@pytest.mark.benchmark(group="gramian")
@pytest.mark.parametrize("impl", IMPLS)
def bench_gramian(grads: Tensor, impl: str, benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(gramian, args=(grads, impl), rounds=7, warmup_rounds=1)


@pytest.mark.benchmark(group="combine")
def bench_combine_copy(grads: Tensor, benchmark: BenchmarkFixture) -> None:
    copy_of((NUM_TASKS + 1) * NUM_COLUMNS, grads, benchmark)


@pytest.mark.benchmark(group="combine")
@pytest.mark.parametrize("impl", IMPLS)
def bench_combine(grads: Tensor, impl: str, benchmark: BenchmarkFixture) -> None:
    weights, out = torch.rand(NUM_TASKS), torch.zeros(NUM_COLUMNS, dtype=grads.dtype)
    benchmark.pedantic(combine, args=(grads, weights, out, impl), rounds=7, warmup_rounds=1)
