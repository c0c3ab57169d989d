"""Properties of gramian and combine that need a GPU; test_gradients.py tests the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl_kernels import combine, gramian, implementations
from fastmtl_kernels.task_gradients import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unless_missing(impl: Any) -> Any:
    found = next(found for found in implementations("cuda")["gramian"] if found.impl == impl)
    return pytest.param(impl, marks=pytest.mark.skipif(not found.available, reason=found.reason))


CUDA, TRITON = unless_missing("cuda"), unless_missing("triton")


def random_lists(num_tasks: int, sizes: list[int], dtype: torch.dtype, shift: int = 0) -> list[list[Tensor]]:
    """Return task gradients on the GPU; every tensor begins `shift` elements into its memory."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        [torch.randn(size + shift, device="cuda", generator=generator).to(dtype)[shift:] for size in sizes]
        for _ in range(num_tasks)
    ]


def check(grads: list[list[Tensor]], impl: Any) -> None:
    """Check against the oracle, and the bits of two runs."""
    gram, expected = gramian(grads, impl), reference.gramian(grads).double()
    norms = expected.diagonal().sqrt()
    assert ((gram - expected).abs() <= 1e-5 * norms[:, None] * norms).all()
    assert torch.equal(gram, gramian(grads, impl))
    weights = torch.randn(len(grads), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    merged, again = (combine(grads, weights, impl=impl) for _ in range(2))
    oracle = [torch.empty_like(tensor, dtype=torch.float32) for tensor in grads[0]]
    reference.combine(grads, weights, oracle)
    for k, (tensor, twin, exact) in enumerate(zip(merged, again, oracle, strict=True)):
        assert torch.equal(tensor, twin)
        magnitude = sum(weight.abs() * task[k].float().abs() for weight, task in zip(weights, grads, strict=True))
        rounding = torch.finfo(tensor.dtype).eps * exact.abs() + torch.finfo(tensor.dtype).tiny
        assert ((tensor.float() - exact).abs() <= rounding + (len(grads) + 1) * 2**-22 * magnitude).all()


@pytest.mark.parametrize("impl", [CUDA, TRITON])
@settings(max_examples=40, deadline=None)
@given(
    num_tasks=st.integers(1, 9),
    size=st.integers(1, 200_000),
    dtype=st.sampled_from(DTYPES),
    shift=st.integers(0, 8),
)
def test_any_size_and_alignment(impl: Any, num_tasks: int, size: int, dtype: torch.dtype, shift: int) -> None:
    check(random_lists(num_tasks, [size], dtype, shift), impl)


@pytest.mark.parametrize("impl", [CUDA, TRITON])
@pytest.mark.parametrize("num_tasks", [16, 33, 64])
def test_many_tasks(impl: Any, num_tasks: int) -> None:
    check(random_lists(num_tasks, [300_001], torch.bfloat16), impl)


@pytest.mark.parametrize("impl", [CUDA])
def test_more_tasks_than_cuda_takes_are_the_references(impl: Any) -> None:
    grads = random_lists(65, [101], torch.float32)
    with pytest.raises(RuntimeError, match="up to 64 tasks, not 65"):
        gramian(grads, impl)
    check(grads, "auto")


def kernels_of(call: Any) -> list[str]:
    """Return the names of the kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("impl", [CUDA])
def test_hundreds_of_tensors_are_read_by_one_launch(impl: Any) -> None:
    grads = random_lists(3, [(k * 7919) % 3001 for k in range(200)], torch.bfloat16)
    check(grads, impl)
    weights = torch.ones(3, device="cuda")
    out = [torch.empty_like(tensor) for tensor in grads[0]]
    assert sum("gramian_kernel" in name for name in kernels_of(lambda: gramian(grads, impl))) == 1
    assert sum("combine_kernel" in name for name in kernels_of(lambda: combine(grads, weights, out, impl))) == 1


@pytest.mark.parametrize("impl", [CUDA, TRITON])
def test_a_graph_captures_both(impl: Any) -> None:
    grads, weights = random_lists(3, [70_001], torch.float32), torch.ones(3, device="cuda")
    expected = gramian(grads, impl), combine(grads, weights, impl=impl)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram, merged = gramian(grads, impl), combine(grads, weights, impl=impl)[0]
    gram.zero_(), merged.zero_()
    graph.replay()
    assert torch.equal(gram, expected[0]) and torch.equal(merged, expected[1])


@pytest.mark.parametrize("impl", [CUDA])
def test_the_operators_on_a_gpu_pass_opcheck(impl: Any) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    grads = [tensor for task in random_lists(3, [101], torch.float32) for tensor in task]
    torch.library.opcheck(torch.ops.fastmtl.gramian.default, (grads, 3), test_utils=checks)
    arguments = (grads, torch.ones(3, device="cuda"), [torch.empty(101, device="cuda")])
    torch.library.opcheck(torch.ops.fastmtl.combine_out.default, arguments, test_utils=checks)
    with pytest.raises(RuntimeError, match="on one GPU"):
        torch.ops.fastmtl.gramian([grads[0], torch.zeros(101)], 2)
