"""combined_adamw: every implementation against AdamW in float64, on lists and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from combined_adamw_cases import OPTIONS, Written, check, exact_sums, lists_of, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl_kernels import _native, combined_adamw, implementations

DEVICES = {"reference": "cpu", "cpp": "cpu", "triton": "cuda"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COPIES = [None, torch.bfloat16, torch.float16]


def unless_missing(impl: Any) -> Any:
    found = next(found for found in implementations(DEVICES[impl])["combined_adamw"] if found.impl == impl)
    marks = [pytest.mark.skipif(not found.available, reason=found.reason)]
    return pytest.param(impl, marks=[*marks, pytest.mark.gpu] if DEVICES[impl] == "cuda" else marks)


IMPLS = [unless_missing(impl) for impl in DEVICES]
needs_cpp = pytest.mark.skipif(bool(_native.why_unavailable()), reason=_native.why_unavailable() or "built")


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=30, deadline=None)
@given(
    tasks=st.integers(1, 9),
    shapes=st.lists(st.lists(st.integers(0, 19), max_size=3).map(tuple), max_size=5),
    copy=st.sampled_from(COPIES),
    step=st.integers(1, 2000),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_lists(
    impl: Any, tasks: int, shapes: list[tuple[int, ...]], copy: Any, step: int, seed: int, data: st.DataObject
) -> None:
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(shapes), max_size=len(shapes)))
    generator, device = torch.Generator().manual_seed(seed), DEVICES[impl] if shapes else "cpu"
    grads, weights = lists_of(shapes, dtypes, tasks, generator)
    before = Written.random(shapes, generator, copy)
    found = before.on(device)
    moved = [[gradient.to(device) for gradient in task] for task in grads]
    combined_adamw(moved, weights.to(device), **found.arguments(), step=step, **OPTIONS, impl=impl)
    check(found, before, *exact_sums(grads, weights), tasks, step)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 1111, 131_111])
def test_flat(impl: Any, dtype: torch.dtype, size: int) -> None:
    """[T, P] of less than a vector, more than a block and more than a piece, not contiguous too."""
    generator, device = torch.Generator().manual_seed(size), DEVICES[impl]
    ((memory,),), weights = lists_of([(6, size)], [dtype], 1, generator)[0], torch.tensor([0.5, -1.0, 2.0])
    rows = memory[::2]
    before = Written.random([(size,)], generator, torch.bfloat16)
    found = before.on(device)
    tensors = {name: values[0] for name, values in found.arguments().items()}
    combined_adamw(rows.to(device), weights.to(device), **tensors, step=3, **OPTIONS, impl=impl)
    check(found, before, *exact_sums([[row] for row in rows], weights), 3, 3)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=20, deadline=None)
@given(
    tasks=st.integers(1, 4),
    size=st.tuples(st.integers(0, 60), st.integers(1, 40)),
    rows=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    copy=st.sampled_from(COPIES),
    seed=st.integers(0, 1000),
)
def test_tables(
    impl: Any, tasks: int, size: tuple[int, int], rows: int, dtype: torch.dtype, copy: Any, seed: int
) -> None:
    """Rows that occur get their gradients; the other rows and their moments decay."""
    generator, device = torch.Generator().manual_seed(seed), DEVICES[impl]
    grads, weights = lists_of([(rows, size[1])], [dtype], tasks, generator)
    slots = torch.randint(-1 - rows, rows, (size[0],), generator=generator, dtype=torch.int32)
    before = Written.random([size], generator, copy)
    found = before.on(device)
    moved = [[gradient.to(device) for gradient in task] for task in grads]
    combined_adamw(moved, weights.to(device), **found.arguments(), step=2, **OPTIONS, slots=slots.to(device), impl=impl)
    merged, magnitudes = (spread(values, slots) for values in exact_sums(grads, weights))
    check(found, before, merged, magnitudes, tasks, 2)


@pytest.mark.parametrize("impl", [unless_missing("reference"), unless_missing("cpp")])
def test_equals_torch_over_many_steps(impl: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(300, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], **OPTIONS)
    ours, m, v = theirs.detach().float(), torch.zeros(300), torch.zeros(300)
    for step in range(1, 31):
        rows, weights = torch.randn(3, 300, generator=generator), torch.randn(3, generator=generator)
        theirs.grad = weights.double() @ rows.double()
        optimizer.step()
        combined_adamw(rows, weights, ours, m, v, step=step, **OPTIONS, impl=impl)
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.double(), optimizer.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v.double(), optimizer.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


def test_float64_is_exact_and_the_references() -> None:
    rows, p = torch.randn(2, 50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    theirs = p.clone().requires_grad_()
    theirs.grad = rows.sum(0)
    torch.optim.AdamW([theirs], **OPTIONS).step()
    combined_adamw(rows, torch.ones(2), p, *torch.zeros(2, 50).double().unbind(), step=1, **OPTIONS)
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_gradients_show(impl: Any, bad: float) -> None:
    rows = torch.ones(2, 20, device=DEVICES[impl])
    rows[1, 7] = bad
    p, m, v = (torch.ones(20, device=DEVICES[impl]) for _ in range(3))
    combined_adamw(rows, torch.ones(2, device=rows.device), p, m, v, step=1, lr=0.1, impl=impl)
    assert (~torch.stack([p, m, v]).isfinite()).any(0).nonzero().tolist() == [[7]]


@needs_cpp
def test_equal_bits_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    grads, weights = lists_of([(400_003,)], [torch.float32], 3, generator)
    before, threads = Written.random([(400_003,)], generator, torch.float16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(before.on("cpu"))
            combined_adamw(grads, weights, **results[-1].arguments(), step=1, **OPTIONS, impl="cpp")
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, values in result.arguments().items():
            assert torch.equal(values[0], getattr(results[0], name)[0])


ROWS, LIST = torch.ones(2, 3), [[torch.ones(4, 3)], [torch.ones(4, 3)]]
TABLE = {name: [torch.ones(5, 3)] for name in ("params", "exp_avgs", "exp_avg_sqs")}


def call(**changed: Any) -> Callable[[], None]:
    given = {"grads": ROWS, "weights": torch.ones(2), "step": 1, "lr": 0.1}
    given |= {name: torch.ones(3) for name in ("params", "exp_avgs", "exp_avg_sqs")}
    return lambda: combined_adamw(**{**given, **changed})


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (call(grads=torch.ones(3)), r"grads .*\[T, P\]"),
        (call(weights=torch.ones(3)), r"weights .*\[2\]"),
        (call(weights=torch.ones(2, device="meta")), "weights .*meta"),
        (call(step=0), "step .*got 0"),
        (call(betas=(0.9, 1.0)), r"betas .*\(0.9, 1.0\)"),
        (call(params=torch.ones(4)), r"params\[0\] .*\[3\].*\[4\]"),
        (call(params=[torch.ones(3)]), "params must be a tensor"),
        (call(params=torch.ones(6)[::2]), r"params\[0\] .*contiguous"),
        (call(params=torch.ones(3).bfloat16()), r"params\[0\] .*float32 or torch.float64, got torch.bfloat16"),
        (call(exp_avgs=torch.ones(3).double()), r"exp_avgs\[0\] .*float32 like params"),
        (call(exp_avg_sqs=torch.ones(3, device="meta")), r"exp_avg_sqs\[0\] .*cpu"),
        (call(copies=torch.ones(3)), r"copies\[0\] .*bfloat16"),
        (call(slots=torch.zeros(3, dtype=torch.int32)), r"slots .*\[n, d\]"),
        (call(grads=LIST, **TABLE, slots=torch.zeros(5)), r"slots must be int32 \[V\]"),
        (call(grads=LIST, **TABLE, slots=torch.full((5,), 4, dtype=torch.int32)), "slots .*4 rows of grads, got 4"),
        (call(grads=LIST, **TABLE, slots=torch.zeros(6, dtype=torch.int32)), r"params\[0\] .*\[6, 3\].*\[5, 3\]"),
        (call(grads=LIST, **{**TABLE, "params": []}), "params must hold 1"),
        (call(impl="cuda"), "impl .*'cuda'"),
    ],
)
def test_a_wrong_argument_is_named(run: Callable[[], None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run()


def test_an_explicit_implementation_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' .*CUDA tensors, not cpu"):
        call(impl="triton")()
    doubles = {name: torch.ones(3).double() for name in ("params", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(RuntimeError, match="impl='cpp' .*not torch.float64"):
        call(**doubles, impl="cpp")()


@needs_cpp
def test_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    numbers = (0.9, 0.1, 0.99, 0.01, 0.1, 1.0, 1e-8)
    for dtype in DTYPES:
        grads, three = [torch.randn(4, 3).to(dtype) for _ in range(2)], [torch.rand(4, 3) for _ in range(3)]
        for copies in ([], [torch.empty(4, 3).half()]):
            arguments = grads, torch.ones(2), *([tensor] for tensor in three), copies, *numbers
            torch.library.opcheck(torch.ops.fastmtl.combined_adamw_.default, arguments, test_utils=checks)
        table, slots = [torch.rand(6, 3) for _ in range(3)], torch.tensor([0, -1, 3, -1, -1, 2], dtype=torch.int32)
        arguments = grads, torch.ones(2), slots, *table, torch.empty(6, 3).bfloat16(), *numbers
        torch.library.opcheck(torch.ops.fastmtl.combined_adamw_rows_.default, arguments, test_utils=checks)


@needs_cpp
@pytest.mark.parametrize(
    ("changed", "slot"),
    [({"params": [torch.zeros(4)]}, None), ({"copies": [torch.zeros(3)]}, None), ({"exp_avgs": []}, None), ({}, 3)],
    ids=["sizes", "copy's dtype", "missing", "slot"],
)
def test_the_operator_itself_never_writes_out_of_bounds(changed: dict[str, Any], slot: int | None) -> None:
    numbers = (0.9, 0.1, 0.99, 0.01, 0.1, 1.0, 1e-8)
    with pytest.raises(RuntimeError, match="combined_adamw"):
        if slot is None:
            lists: dict[str, list[Tensor]] = {name: [torch.zeros(3)] for name in ("params", "exp_avgs", "exp_avg_sqs")}
            given = {**lists, "copies": [], **changed}
            torch.ops.fastmtl.combined_adamw_([torch.zeros(3)], torch.ones(1), *given.values(), *numbers)
        else:
            three = (torch.zeros(2, 2) for _ in range(3))
            slots = torch.full((2,), slot, dtype=torch.int32)
            torch.ops.fastmtl.combined_adamw_rows_([torch.zeros(3, 2)], torch.ones(1), slots, *three, None, *numbers)
