"""low_rank, lora: the oracle against torch, torch's products against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from low_rank_cases import ACTIVATIONS, Case, cases, check, run

from fastmtl_kernels.philox import keep_mask
from fastmtl_kernels.task_maps.low_rank import lora, low_rank

IMPLS = ["reference", "torch"]
PLAIN: dict[str, Any] = dict(
    sizes=(20, 0, 1, 50), tail=3, columns=37, rank=6, dtype=torch.float32, layout="dense", transposed=True,
    down_bias=True, up_bias=True, activation="gelu", rates=(0.3, 0.1, 0.0, 0.5), seed=5,
)  # fmt: skip
SEED = torch.tensor([-(2**40) + 3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_oracle_is_torch(activation: str) -> None:
    """Compare with torch's own layers per task in float64, with the mask of the definition."""
    case = Case(**{**PLAIN, "dtype": torch.float64, "activation": activation})
    tensors, dy = case.tensors("cpu")
    found = run(case, "reference", "cpu")
    function = {"identity": lambda z: z, "gelu": F.gelu, "relu": F.relu}[activation]
    for task, (start, stop) in enumerate(zip(case.offsets, case.offsets[1:], strict=False)):
        x = tensors["x"][start:stop].clone().requires_grad_()
        down, up, down_bias, up_bias = (
            tensors[name][task].clone().requires_grad_() for name in ("down", "up", "down_bias", "up_bias")
        )
        y = F.linear(function(F.linear(x, down.T, down_bias)), up.T, up_bias)
        rate = PLAIN["rates"][task]
        keep = keep_mask(torch.tensor([case.seed * 2**20 + 1]), stop, case.columns, rate)[start:]
        y = torch.where(keep, y / (1 - rate), 0.0)
        y.backward(dy[start:stop])
        torch.testing.assert_close(found["y"][start:stop], y.detach())
        torch.testing.assert_close(found["x"][start:stop], x.grad)
        for name, leaf in (("down", down), ("up", up), ("down_bias", down_bias), ("up_bias", up_bias)):
            torch.testing.assert_close(found[name][task], leaf.grad)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_case(case: Case) -> None:
    check(case, "torch")


@pytest.mark.parametrize("rank", [8, 204])
@pytest.mark.parametrize("columns", [384, 768])
def test_widths_of_encoders(columns: int, rank: int) -> None:
    check(Case(**{**PLAIN, "columns": columns, "rank": rank, "sizes": (150, 64, 131), "tail": 0}), "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_lora_is_low_rank_with_biases(impl: Any) -> None:
    tensors, _ = Case(**PLAIN).tensors("cpu")
    arguments: dict[str, Any] = dict(token_offsets=(0, 20, 20, 21, 71), dropout_p=0.2, seed=SEED, impl=impl)
    assert torch.equal(lora(**tensors, **arguments), low_rank(**tensors, **arguments))
    with pytest.raises(ValueError, match="^up_bias must be given"):
        lora(**{**tensors, "up_bias": None}, **arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rates", [0.25, (0.25, 0.0, 0.6)])
def test_forward_and_backward_drop_the_same(impl: Any, rates: Any) -> None:
    """Identity maps give x a gradient of zero exactly where y is dropped."""
    x = torch.ones(300, 96, requires_grad=True)
    eye = torch.eye(96).expand(3, -1, -1)
    y = low_rank(x, eye, eye, (0, 100, 200, 300), dropout_p=rates, seed=SEED, impl=impl)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, y.detach())
    for task, rate in enumerate(rates if isinstance(rates, tuple) else [rates] * 3):
        rows = y[100 * task : 100 * task + 100].detach()
        assert set(rows.unique().tolist()) == ({0.0, float(torch.tensor(1.0) * (1 / (1 - rate)))} if rate else {1.0})
        assert abs((rows == 0).float().mean() - rate) < 4 * (rate * (1 - rate) / rows.numel()) ** 0.5 + 1e-9


def test_gradients_have_the_strides_of_their_parameters() -> None:
    """The gradients have the parameters' strides, so that autograd keeps them without a copy."""
    tensors, dy = Case(**PLAIN).tensors("cpu")
    weights = {name: tensors[name].mT.contiguous().requires_grad_() for name in ("down", "up")}
    y = low_rank(tensors["x"], weights["down"].mT, weights["up"].mT, (0, 20, 20, 21, 71), impl="torch")
    grads = torch.autograd.grad(y, list(weights.values()), dy.nan_to_num())
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("asks", ["x", "down", "up", "down_bias", "up_bias"])
def test_only_what_asks_gets_a_gradient(impl: Any, asks: str) -> None:
    case = Case(**{**PLAIN, "rates": None})
    tensors, dy = case.tensors("cpu")
    tensors[asks].requires_grad_()
    y = low_rank(**tensors, token_offsets=case.offsets, activation="gelu", impl=impl)
    (grad,) = torch.autograd.grad(y, [tensors[asks]], dy)
    torch.testing.assert_close(grad, run(case, impl, "cpu")[asks], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_of_another_dtype(impl: Any) -> None:
    tensors, dy = Case(**PLAIN).tensors("cpu")
    arguments: dict[str, Any] = dict(token_offsets=(0, 20, 20, 21, 71), impl=impl)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    down = tensors["down"].requires_grad_()
    y = low_rank(**{**half, "down": down}, **arguments)
    torch.testing.assert_close(y, low_rank(**half, **arguments))
    assert torch.autograd.grad(y, down, dy.bfloat16().nan_to_num())[0].dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_is_that_of_linear_layers(impl: Any) -> None:
    tensors, _ = Case(**PLAIN).tensors("cpu")
    arguments: dict[str, Any] = dict(token_offsets=(0, 20, 20, 21, 71), impl=impl)
    expected = low_rank(**{name: tensor.bfloat16() for name, tensor in tensors.items()}, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = low_rank(**tensors, **arguments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_of_any_kind(impl: Any) -> None:
    class Both:
        offsets = torch.tensor([0, 20, 20, 21, 71], dtype=torch.int32)
        host = (0, 20, 20, 21, 71)

    tensors, _ = Case(**PLAIN).tensors("cpu")
    results = [
        low_rank(**tensors, token_offsets=offsets, impl=impl)
        for offsets in (Both(), Both.offsets, Both.host, list(Both.host))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
    with torch.no_grad():
        assert torch.equal(results[0], low_rank(**tensors, token_offsets=Both.host, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_at_all(impl: Any) -> None:
    for tail in (0, 3):
        results = run(Case(**{**PLAIN, "sizes": (0, 0), "tail": tail, "rates": 0.1}), impl, "cpu")
        assert results["y"].shape == (tail, 37)
        assert not any(result.any() for result in results.values())


X, DOWN, UP = torch.randn(6, 4), torch.randn(2, 4, 3), torch.randn(2, 3, 4)
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("x", dict(x=torch.randn(6))),
    ("x", dict(x=torch.ones(6, 4, dtype=torch.int64))),
    ("x", dict(x=torch.randn(6, 0))),
    ("down", dict(down=torch.randn(4, 3))),
    ("down", dict(down=torch.randn(3, 4, 3))),
    ("down", dict(down=torch.randn(2, 5, 3))),
    ("down", dict(down=torch.randn(2, 4, 0))),
    ("down", dict(down=DOWN.int())),
    ("down", dict(down=None)),
    ("down", dict(down=DOWN.to("meta"))),
    ("up", dict(up=torch.randn(2, 2, 4))),
    ("up", dict(up=torch.randn(2, 3, 0))),
    ("down_bias", dict(down_bias=torch.randn(2, 4))),
    ("down_bias", dict(down_bias=torch.randn(3))),
    ("up_bias", dict(up_bias=torch.randn(2, 3))),
    ("activation", dict(activation="tanh")),
    ("dropout_p", dict(dropout_p=1.0, seed=SEED)),
    ("dropout_p", dict(dropout_p=(0.1, -0.1), seed=SEED)),
    ("dropout_p", dict(dropout_p=(0.1,), seed=SEED)),
    ("dropout_p", dict(dropout_p=torch.tensor([0.1, 0.1]), seed=SEED)),
    ("seed", dict(dropout_p=0.1)),
    ("seed", dict(dropout_p=(0.0, 0.1))),
    ("seed", dict(dropout_p=0.1, seed=7)),
    ("seed", dict(seed=torch.tensor([0, 1]))),
    ("token_offsets", dict(token_offsets=torch.tensor([0, 3, 6]))),
    ("token_offsets", dict(token_offsets=(0, 4, 3))),
    ("token_offsets", dict(token_offsets=(0, 3, 7))),
    ("token_offsets", dict(token_offsets=(1, 3, 6))),
    ("impl", dict(impl="cuda")),
]


@pytest.mark.parametrize("name, wrong", WRONG, ids=[f"{name}-{k}" for k, (name, _) in enumerate(WRONG)])
def test_errors_name_the_argument(name: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(x=X, down=DOWN, up=UP, token_offsets=(0, 3, 6))
    with pytest.raises(ValueError, match=f"^{name} must"):
        low_rank(**{**arguments, **wrong})


def test_an_explicit_implementation_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' cannot be used here"):
        low_rank(X, DOWN, UP, (0, 3, 6), impl="triton")
