"""gramian and combine: every implementation against float64, in every dtype, layout and size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl_kernels import _native, combine, gramian, implementations

DEVICES = {"reference": "cpu", "cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


def unless_missing(impl: Any) -> Any:
    """Return the implementation as a parameter, skipped with the reason where it cannot be used."""
    found = next(found for found in implementations(DEVICES[impl])["gramian"] if found.impl == impl)
    marks = [pytest.mark.skipif(not found.available, reason=found.reason)]
    return pytest.param(impl, marks=[*marks, pytest.mark.gpu] if DEVICES[impl] == "cuda" else marks)


needs_cpp = pytest.mark.skipif(bool(_native.why_unavailable()), reason=_native.why_unavailable() or "built")
LIST_IMPLS = [unless_missing(impl) for impl in ("reference", "cpp", "cuda")]
IMPLS = [*LIST_IMPLS, unless_missing("triton")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, less than a vector, odd, more than one block, more than one piece of 65,536 columns.
SIZES = [1, 7, 63, 1111, 9001, 131_111]


def random_rows(num_tasks: int, size: int, dtype: torch.dtype, impl: Any = "cpp", seed: int = 0) -> Tensor:
    """Return [num_tasks, size] on the device of an implementation."""
    return torch.randn(num_tasks, size, generator=torch.Generator().manual_seed(seed)).to(DEVICES[impl], dtype)


def gramian64(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().T


def assert_gramian(gram: Tensor, rows: Tensor) -> None:
    """Check symmetry, and an error of at most 1e-5 |g_i| |g_j| against float64."""
    assert gram.dtype == torch.float32 and gram.device == rows.device
    norms = rows.double().norm(dim=1)
    assert ((gram.double() - gramian64(rows)).abs() <= 1e-5 * norms[:, None] * norms).all()
    assert torch.equal(gram, gram.T)


def assert_combined(merged: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Check the error: at most a rounding of the result's dtype and of T float32 additions."""
    exact = weights.double() @ rows.double()
    magnitude = weights.double().abs() @ rows.double().abs()
    rounding = 0.0 if merged.dtype == torch.float32 else torch.finfo(merged.dtype).eps / 2
    tiny = torch.finfo(merged.dtype).tiny
    error = (merged.double() - exact).abs()
    assert (error <= 1.01 * rounding * exact.abs() + (len(rows) + 1) * 2**-23 * magnitude + tiny).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8])
def test_flat(impl: Any, dtype: torch.dtype, size: int, num_tasks: int) -> None:
    rows = random_rows(num_tasks, size, dtype, impl)
    weights = torch.randn(num_tasks, generator=torch.Generator().manual_seed(1)).to(rows.device)
    assert_gramian(gramian(rows, impl), rows)
    merged = combine(rows, weights, impl=impl)
    assert isinstance(merged, Tensor) and merged.dtype == dtype and merged.shape == (size,)
    assert_combined(merged, rows, weights)


@pytest.mark.parametrize("impl", LIST_IMPLS)
@settings(max_examples=40, deadline=None)
@given(
    num_tasks=st.integers(1, 8),
    shapes=st.lists(st.lists(st.integers(0, 19), max_size=3), max_size=6),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_lists(impl: Any, num_tasks: int, shapes: list[list[int]], seed: int, data: st.DataObject) -> None:
    """Tensors of any shapes and dtypes are one row per task; outputs have the tensors' shapes."""
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(shapes), max_size=len(shapes)))
    generator = torch.Generator().manual_seed(seed)
    grads = [
        [
            torch.randn(shape, generator=generator).to(DEVICES[impl], dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        for _ in range(num_tasks)
    ]
    device = DEVICES[impl] if shapes else "cpu"
    weights = torch.randn(num_tasks, generator=generator).to(device)
    rows = torch.stack(
        [torch.cat([torch.zeros(0, device=device), *(t.flatten().float() for t in task)]) for task in grads]
    )
    assert_gramian(gramian(grads, impl), rows)
    merged = combine(grads, weights, impl=impl)
    assert [(tuple(m.shape), m.dtype) for m in merged] == [(tuple(g.shape), g.dtype) for g in grads[0]]
    for k, tensor in enumerate(merged):
        assert_combined(tensor.flatten(), torch.stack([task[k].flatten() for task in grads]), weights)


@pytest.mark.parametrize("impl", LIST_IMPLS)
def test_large_lists_cross_pieces(impl: Any) -> None:
    """Tensors begin and end inside the pieces of the threads."""
    sizes = [40_000, 3, 0, 70_001, 1, 65_536, 128]
    rows = random_rows(3, sum(sizes), torch.float32, impl)
    grads = [list(row.split(sizes)) for row in rows]
    assert_gramian(gramian(grads, impl), rows)
    weights = torch.tensor([0.5, -1.0, 2.0], device=rows.device)
    assert_combined(torch.cat(combine(grads, weights, impl=impl)), rows, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_not_contiguous(impl: Any) -> None:
    rows = random_rows(6, 1001, torch.float32, impl)
    strided, weights = rows[::2, 1::3], torch.randn(3).to(rows.device)
    assert_gramian(gramian(strided, impl), strided)
    merged = combine(strided, weights, impl=impl)
    assert isinstance(merged, Tensor)
    assert_combined(merged, strided, weights)
    transposed = [[rows[t].view(77, 13).T] for t in range(3)]
    assert torch.equal(
        gramian(transposed, impl), gramian([[t.contiguous() for t in task] for task in transposed], impl)
    )
    assert torch.equal(combine(transposed, weights, impl=impl)[0], combine(rows[:3], weights, impl=impl).view(77, 13).T)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_is_float", [False, True])
def test_out_is_filled_and_returned(impl: Any, dtype: torch.dtype, out_is_float: bool) -> None:
    rows = random_rows(3, 1003, dtype, impl)
    weights = torch.tensor([1.0, 0.0, -0.25], device=rows.device)
    out = torch.full((1003,), math.nan, dtype=torch.float32 if out_is_float else dtype, device=rows.device)
    assert combine(rows, weights, out, impl) is out
    assert_combined(out, rows, weights)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_read(impl: Any) -> None:
    device = DEVICES[impl]
    assert torch.equal(gramian(torch.zeros(2, 0, device=device), impl), torch.zeros(2, 2, device=device))
    assert combine(torch.zeros(2, 0, device=device), torch.ones(2, device=device), impl=impl).shape == (0,)
    if device == "cpu":  # the device of lists without tensors
        assert torch.equal(gramian([[], []], impl), torch.zeros(2, 2))
        assert combine([[], []], torch.ones(2), impl=impl) == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(impl: Any, dtype: torch.dtype) -> None:
    """Zeros, subnormals, infinities, NaNs and roundings are those of torch."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICES[impl])
    half, one = torch.tensor([[0.5], [1.0]], device=every.device)
    expected = torch.empty_like(every)
    expected.copy_(every.float() * 0.5)
    assert torch.equal(
        torch.nan_to_num(combine(every[None], half, impl=impl), nan=7.0),  # type: ignore[arg-type]
        torch.nan_to_num(expected, nan=7.0),
    )
    as_float = combine(every[None], one, torch.empty(2**16, device=every.device), impl)
    assert torch.equal(torch.nan_to_num(as_float, nan=7.0), torch.nan_to_num(every.float(), nan=7.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 500, 1000])
def test_non_finite_gradients_show(impl: Any, bad: float, where: int) -> None:
    rows = random_rows(3, 1001, torch.float32, impl)
    rows[1, where] = bad
    finite = gramian(rows, impl).isfinite()
    assert not finite[1].any() and finite[0, 0] and finite[0, 2] and finite[2, 2]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_scales(impl: Any, scale: float) -> None:
    rows = random_rows(4, 5001, torch.float32, impl) * scale
    assert_gramian(gramian(rows, impl), rows)


@pytest.mark.parametrize("impl", [unless_missing("reference"), unless_missing("cpp")])
def test_equal_bits_for_any_number_of_threads(impl: Any) -> None:
    rows, weights = random_rows(3, 500_003, torch.float32), torch.tensor([0.3, 0.3, -1.7])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append((gramian(rows, impl), combine(rows, weights, impl=impl)))
    finally:
        torch.set_num_threads(before)
    for gram, merged in results[1:]:
        assert torch.equal(merged, results[0][1])  # type: ignore[arg-type]
        if impl == "cpp":  # the reference uses the vendor's matrix product, which promises less
            assert torch.equal(gram, results[0][0])


@pytest.mark.parametrize("op", [gramian, lambda rows: combine(rows, torch.ones(2))])
def test_float64_is_exact_and_the_references(op: object) -> None:
    rows = torch.randn(2, 1001, dtype=torch.float64)
    result = op(rows)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, gramian64(rows) if op is gramian else rows.sum(0), rtol=1e-14, atol=1e-14)


@needs_cpp
def test_opcheck() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for dtype in DTYPES:
        grads = list(random_rows(4, 101, dtype).unbind(0))
        torch.library.opcheck(torch.ops.fastmtl.gramian.default, (grads, 2), test_utils=checks)
        torch.library.opcheck(torch.ops.fastmtl.gramian.default, (grads, 4), test_utils=checks)
        out = [torch.empty(101, dtype=dtype), torch.empty(101)]
        torch.library.opcheck(torch.ops.fastmtl.combine_out.default, (grads, torch.ones(2), out), test_utils=checks)


@needs_cpp
@pytest.mark.parametrize(
    ("grads", "num_tasks"),
    [
        ([torch.zeros(3), torch.zeros(4)], 2),
        ([torch.zeros(3), torch.zeros(3).half()], 2),
        ([torch.zeros(3)] * 3, 2),
        ([torch.zeros(3)], 0),
        ([torch.zeros(3, 2).T], 1),
        ([torch.zeros(3).double()], 1),
    ],
    ids=["sizes", "dtypes", "uneven", "no tasks", "strided", "float64"],
)
def test_the_operator_itself_never_reads_out_of_bounds(grads: list[Tensor], num_tasks: int) -> None:
    with pytest.raises(RuntimeError, match="gramian"):
        torch.ops.fastmtl.gramian(grads, num_tasks)
