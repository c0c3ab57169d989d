"""The Triton kernels of combined_adamw in Triton's interpreter, against AdamW in float64.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from combined_adamw_cases import OPTIONS, Written, check, exact_sums, lists_of, spread
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreter import interpreted
from torch import Tensor

pytestmark = interpreted
DTYPES = [torch.float32, torch.float16]
COPIES = [None, torch.float16]
BLOCK = 64  # small, so that small tensors have several


def run(grads: list[list[Tensor]], weights: Tensor, found: Written, step: int, slots: Tensor | None = None) -> None:
    """Call the launcher, whose arguments the public operation checks."""
    from fastmtl_kernels.combined_adamw import reference
    from fastmtl_kernels.combined_adamw import triton as combined_adamw_triton

    copies: Sequence[Tensor | None] = found.copies or [None] * len(found.params)
    lists = zip(found.params, found.exp_avgs, found.exp_avg_sqs, copies, strict=True)
    targets = [reference.Written(*tensors) for tensors in lists]
    with mock.patch.object(combined_adamw_triton, "BLOCK", BLOCK):
        combined_adamw_triton.combined_adamw(grads, weights, targets, reference.Update.at(step, **OPTIONS), slots)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tasks=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=4),
    copy=st.sampled_from(COPIES),
    shift=st.integers(0, 3),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_lists(
    tasks: int, sizes: list[int], copy: torch.dtype | None, shift: int, seed: int, data: st.DataObject
) -> None:
    """Tensors of several dtypes at any address; memory before and after them stays unchanged."""
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(sizes), max_size=len(sizes)))
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(size + shift + 5,) for size in sizes]
    memory, weights = lists_of(shapes, dtypes, tasks, generator)
    guarded = Written.random(shapes, generator, copy)
    whole = {name: values for name, values in guarded.arguments().items() if values is not None}
    before = {name: [tensor.clone() for tensor in values] for name, values in whole.items()}

    def inner(lists: dict[str, list[Tensor]]) -> Written:
        cut: dict[str, Any] = {"copies": None}
        for name, tensors in lists.items():
            cut[name] = [tensor[shift : shift + size] for tensor, size in zip(tensors, sizes, strict=True)]
        return Written(**cut)

    grads = [[t[shift : shift + s] for t, s in zip(task, sizes, strict=True)] for task in memory]
    run(grads, weights, inner(whole), 2)
    check(inner(whole), inner(before), *exact_sums(grads, weights), tasks, 2)
    for name, values in whole.items():
        for tensor, old, size in zip(values, before[name], sizes, strict=True):
            outside = torch.ones(len(tensor), dtype=torch.bool)
            outside[shift : shift + size] = False
            assert torch.equal(tensor[outside].nan_to_num(7.0), old[outside].nan_to_num(7.0))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tasks=st.integers(1, 3),
    size=st.tuples(st.integers(0, 5), st.integers(1, 2 * BLOCK)),
    rows=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    copy=st.sampled_from(COPIES),
    seed=st.integers(0, 100),
)
@example(1, (4, BLOCK), 0, torch.float32, None, 0)
def test_tables(
    tasks: int, size: tuple[int, int], rows: int, dtype: torch.dtype, copy: torch.dtype | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads, weights = lists_of([(rows, size[1])], [dtype], tasks, generator)
    slots = torch.randint(-1 - rows, rows, (size[0],), generator=generator, dtype=torch.int32)
    before = Written.random([size], generator, copy)
    found = before.on("cpu")
    run(grads, weights, found, 5, slots)
    merged, magnitudes = (spread(values, slots) for values in exact_sums(grads, weights))
    check(found, before, merged, magnitudes, tasks, 5)


def test_non_finite_gradients_show() -> None:
    found = Written([torch.ones(70)], [torch.ones(70)], [torch.ones(70)], None)
    gradient = torch.ones(70)
    gradient[66] = math.inf
    run([[gradient]], torch.ones(1), found, 1)
    assert (~found.params[0].isfinite()).nonzero().tolist() == [[66]]
