"""add_layer_norm on CPUs: the oracle against torch, the kernels against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from add_layer_norm_cases import Case, cases, check, run
from hypothesis import given, settings
from row_cases import RecordingSink

from fastmtl_kernels.add_layer_norm.api import add_layer_norm, add_layer_norm_with_sum
from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.philox import keep_mask

REASON = unsupported_reason("add_layer_norm", "cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
PLAIN: dict[str, Any] = dict(
    sizes=(20, 0, 1, 50), tail=3, columns=37, dtype=torch.float32, parameter_dtype=torch.float32, layout="dense",
    ts=True, dropout_p=0.3, sink=True, seed=5,
)  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_oracle_is_torch(dropout_p: float) -> None:
    """Compare with torch's own operations in float64, with the mask of the definition."""
    generator = torch.Generator().manual_seed(0)
    residual, x, ts = (torch.randn(17, 13, dtype=torch.float64, generator=generator) for _ in range(3))
    weight, bias = (torch.randn(13, dtype=torch.float64, generator=generator) for _ in range(2))
    inputs = [residual, x, weight, bias, ts]
    for tensor in inputs:
        tensor.requires_grad_()
    seed = torch.tensor([-(2**40) + 3])
    keep = keep_mask(seed, 17, 13, dropout_p) if dropout_p else torch.ones(17, 13)
    expected = F.layer_norm(residual + x * keep / (1 - dropout_p) + ts, (13,), weight, bias, 1e-12)
    found = add_layer_norm(residual, x, weight, bias, ts=ts, dropout_p=dropout_p, seed=seed)
    dy = torch.randn(17, 13, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_task_gradients_of_the_oracle() -> None:
    """Gradients per task equal those of one backward per task."""
    case = Case(**{**PLAIN, "dtype": torch.float64, "parameter_dtype": torch.float64})
    found, _ = run(case, "reference", "cpu")
    tensors, dy = case.tensors("cpu")
    offsets = case.offsets or ()
    for t, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        seed = torch.tensor([case.seed * 2**20 + 1])
        y = add_layer_norm(**leaves, dropout_p=0.3, eps=1e-5, seed=seed, token_offsets=offsets, impl="reference")
        y[start:stop].backward(dy[start:stop])
        for name in ("weight", "bias"):
            torch.testing.assert_close(found[name][t], leaves[name].grad)


@pytest.mark.parametrize("impl", IMPLS[1:])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_case(impl: Any, case: Case) -> None:
    check(case, impl)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("columns", [384, 768, 1023])
def test_widths_of_encoders(impl: Any, columns: int) -> None:
    check(Case(**{**PLAIN, "columns": columns, "sizes": (150, 64, 131)}), impl)


@needs_cpp
def test_bits_do_not_depend_on_threads() -> None:
    case = Case(**{**PLAIN, "sizes": (200, 311)})
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(case, "cpp", "cpu")[0])
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_and_backward_drop_the_same(impl: Any) -> None:
    """x's gradient is 0 where x is dropped, and 1 / (1 - p) times the residual's elsewhere."""
    generator = torch.Generator().manual_seed(0)
    residual, x = (torch.randn(301, 96, generator=generator).requires_grad_() for _ in range(2))
    weight, seed = torch.ones(96), torch.tensor([11])
    y = add_layer_norm(residual, x, weight, weight, dropout_p=0.25, seed=seed, impl=impl)
    dresidual, dx = torch.autograd.grad(y, [residual, x], torch.randn(y.shape, generator=generator))
    keep = keep_mask(seed, 301, 96, 0.25)
    assert not dx[~keep].any()
    torch.testing.assert_close(dx[keep], dresidual[keep] / 0.75)
    expected = add_layer_norm(residual, x * keep / 0.75, weight, weight, impl="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_parameters_and_inputs(impl: Any) -> None:
    """Only tensors that require a gradient get one, with a sink or without."""
    tensors, dy = Case(**PLAIN).tensors("cpu")
    tensors["x"].requires_grad_()
    tensors["weight"].requires_grad_()
    sink = RecordingSink()
    y = add_layer_norm(**tensors, token_offsets=(0, 20, 20, 21, 71), task_grads=sink, impl=impl)
    y.backward(dy)
    assert list(sink.dense) == [id(tensors["weight"])]
    assert tensors["x"].grad is not None and tensors["residual"].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_alone_has_a_gradient(impl: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    residual, x = (torch.randn(9, 5, generator=generator).requires_grad_() for _ in range(2))
    total, _ = add_layer_norm_with_sum(residual, x, torch.ones(5), None, token_offsets=(0, 7), impl=impl)
    assert torch.equal(total[:7], (residual + x)[:7]) and not total[7:].any()
    for gradient in torch.autograd.grad(total.sum(), [residual, x]):
        assert torch.equal(gradient[:7], torch.ones(7, 5)) and not gradient[7:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_of_any_kind(impl: Any) -> None:
    class Both:
        offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
        host = (0, 3, 7)

    rows, column = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.ones(5)
    results = [
        add_layer_norm(rows, rows, column, column, token_offsets=offsets, impl=impl)
        for offsets in (Both(), Both.offsets, Both.host, list(Both.host))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert results[0][:7].any() and not results[0][7:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients_the_result_is_the_same(impl: Any) -> None:
    tensors, _ = Case(**PLAIN).tensors("cpu")
    arguments = dict(dropout_p=0.3, seed=torch.tensor([3]), token_offsets=(0, 71), impl=impl)
    with torch.no_grad():
        y = add_layer_norm(**tensors, **arguments)
    assert torch.equal(y, add_layer_norm(**tensors, **arguments))


ROWS, COLUMN = torch.randn(6, 4), torch.ones(4)
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("residual", dict(residual=torch.randn(6))),
    ("residual", dict(residual=torch.ones(6, 4, dtype=torch.int64))),
    ("residual", dict(residual=torch.randn(6, 0))),
    ("x", dict(x=torch.randn(6, 3))),
    ("dropout_p", dict(x=None, dropout_p=0.1, seed=torch.tensor([0]))),
    ("x", dict(x=torch.empty(6, 4, device="meta"))),
    ("ts", dict(ts=torch.randn(5, 4))),
    ("weight", dict(weight=torch.ones(3))),
    ("weight", dict(weight=torch.ones(4, dtype=torch.int32))),
    ("bias", dict(bias=torch.ones(4, dtype=torch.int32))),
    ("bias", dict(bias=torch.ones(1, 4))),
    ("dropout_p", dict(dropout_p=1.0, seed=torch.tensor([0]))),
    ("seed", dict(dropout_p=0.1)),
    ("seed", dict(dropout_p=0.1, seed=7)),
    ("seed", dict(seed=torch.tensor([0, 1]))),
    ("seed", dict(seed=torch.tensor([0], dtype=torch.int32))),
    ("token_offsets", dict(token_offsets=torch.tensor([0, 6]))),
    ("token_offsets", dict(token_offsets=torch.tensor([0], dtype=torch.int32))),
    ("token_offsets", dict(token_offsets=(0, 4, 3))),
    ("token_offsets", dict(token_offsets=(0, 7))),
    ("token_offsets", dict(token_offsets=(1, 6))),
    ("token_offsets", dict(task_grads=RecordingSink())),
    ("impl", dict(impl="cuda")),
]


@pytest.mark.parametrize("name, wrong", WRONG, ids=[f"{name}-{k}" for k, (name, _) in enumerate(WRONG)])
def test_errors_name_the_argument(name: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(residual=ROWS, x=ROWS, weight=COLUMN, bias=COLUMN)
    with pytest.raises(ValueError, match=f"^{name} must"):
        add_layer_norm(**{**arguments, **wrong})


def test_an_explicit_implementation_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' cannot be used here"):
        add_layer_norm(ROWS, ROWS, COLUMN, COLUMN, impl="triton")
    with pytest.raises(RuntimeError, match="not torch.float64"):
        add_layer_norm(ROWS.double(), ROWS, COLUMN, COLUMN, impl="cpp")
