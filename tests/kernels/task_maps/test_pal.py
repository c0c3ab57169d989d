"""pal: the oracle against torch and transformers, torch's products against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from pal_cases import ACTIVATIONS, Case, cases, check, run

from fastmtl_kernels.philox import keep_mask
from fastmtl_kernels.task_maps.pal import pal

IMPLS = ["reference", "torch"]
SEED = torch.tensor([-(2**40) + 3])
PLAIN: dict[str, Any] = dict(
    lengths=((3, 12, 1), (), (5,), (30, 20)), tail=3, columns=37, num_heads=3, head_dim=5, dtype=torch.float32,
    layout="dense", transposed=True, biases=True, activation="gelu", dropout_p=0.0, rate=0.0, seed=5,
)  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_oracle_is_torch(activation: str) -> None:
    """Compare with torch's own attention per sequence in float64, and its summed gradients."""
    case = Case(**{**PLAIN, "dtype": torch.float64, "activation": activation})
    tensors, dy = case.tensors("cpu")
    for tensor in tensors.values():
        tensor.requires_grad_()
    function = {"identity": lambda z: z, "gelu": F.gelu, "relu": F.relu}[activation]
    parts, start = [], 0
    for task, lengths in enumerate(case.lengths):
        down, qkv, up, down_bias, qkv_bias, up_bias = (
            tensors[name][task] for name in ("down", "qkv", "up", "down_bias", "qkv_bias", "up_bias")
        )
        for length in lengths:
            e = F.linear(tensors["x"][start : start + length], down.T, down_bias)
            q, k, v = F.linear(e, qkv.T, qkv_bias).view(length, 3, 3, 5).permute(1, 2, 0, 3)
            z = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, 15)
            parts.append(function(F.linear(z, up.T, up_bias)))
            start += length
    y = torch.cat(parts)
    grads = torch.autograd.grad(y, list(tensors.values()), dy[:start])
    found = run(case, "reference", "cpu")
    torch.testing.assert_close(found["y"][:start], y)
    for name, grad in zip(tensors, grads, strict=True):
        torch.testing.assert_close(found[name], grad, equal_nan=False)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_case(case: Case) -> None:
    check(case, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_encoders(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = dict(columns=768, num_heads=12, head_dim=17, dropout_p=0.1, rate=0.1, dtype=dtype)
    check(Case(**{**PLAIN, **sizes}), "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_tasks_and_sequences_do_not_see_each_other(impl: Any) -> None:
    """A change in one sequence, or in one task's parameters, changes no other row."""
    case = Case(**PLAIN)
    tensors, _ = case.tensors("cpu")
    arguments: dict[str, Any] = dict(
        cu_seqlens=torch.tensor(case.cu_seqlens, dtype=torch.int32), token_offsets=case.offsets, num_heads=3, impl=impl
    )
    y = pal(**tensors, **arguments)
    x = tensors["x"].clone()
    x[3:15] += 1
    moved = (pal(**{**tensors, "x": x}, **arguments) != y).any(1)
    assert moved[3:15].all() and moved.sum() == 12
    for name in ("down", "qkv", "up"):
        parameter = tensors[name].clone()
        parameter[2] *= 2
        moved = (pal(**{**tensors, name: parameter}, **arguments) != y).any(1)
        assert moved[16:21].all() and moved.sum() == 5, name


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_of_the_output(impl: Any) -> None:
    """Dropout has the definition's mask, with each task's probability."""
    case = Case(**PLAIN)
    tensors, _ = case.tensors("cpu")
    arguments: dict[str, Any] = dict(
        cu_seqlens=torch.tensor(case.cu_seqlens, dtype=torch.int32), token_offsets=case.offsets, num_heads=3, impl=impl
    )
    rates = (0.5, 0.0, 0.0, 0.25)
    y, dropped = pal(**tensors, **arguments), pal(**tensors, **arguments, out_dropout_p=rates, seed=SEED)
    for (start, stop), rate in zip(zip(case.offsets, case.offsets[1:], strict=False), rates, strict=True):
        keep = keep_mask(SEED, stop, case.columns, rate)[start:]
        torch.testing.assert_close(dropped[start:stop], torch.where(keep, y[start:stop] / (1 - rate), 0.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_of_probabilities(impl: Any) -> None:
    """Values of one and an identity map up make y each row's sum of kept probabilities."""
    down, up = torch.zeros(1, 4, 4), torch.eye(4)[None]
    ones = torch.cat([torch.zeros(8), torch.ones(4)])[None]
    offsets = torch.tensor([0, 200], dtype=torch.int32)
    y = pal(
        torch.randn(200, 4), down, torch.zeros(1, 4, 12), up, offsets, offsets, num_heads=2, qkv_bias=ones,
        dropout_p=0.25, seed=SEED, impl=impl,
    )  # fmt: skip
    kept = y * 0.75 * 200
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert torch.equal(y[:, 0], y[:, 1]) and not torch.equal(y[:, 0], y[:, 2])
    assert abs(y.mean() - 1) < 0.01 and y.std() > 0.01


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast(impl: Any) -> None:
    case = Case(**PLAIN)
    tensors, _ = case.tensors("cpu")
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    arguments: dict[str, Any] = dict(cu_seqlens=cu_seqlens, token_offsets=case.offsets, num_heads=3, impl=impl)
    expected = pal(**{name: tensor.bfloat16() for name, tensor in tensors.items()}, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = pal(**tensors, **arguments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_at_all(impl: Any) -> None:
    for tail in (0, 3):
        results = run(Case(**{**PLAIN, "lengths": ((), ()), "tail": tail, "rate": 0.1, "dropout_p": 0.1}), impl, "cpu")
        assert results["y"].shape == (tail, 37)
        assert not any(result.any() for result in results.values())


X = torch.randn(6, 4)
PARAMETERS: dict[str, Any] = dict(down=torch.randn(2, 4, 6), qkv=torch.randn(2, 6, 18), up=torch.randn(2, 6, 4))
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("x", dict(x=torch.randn(6))),
    ("down", dict(down=torch.randn(2, 5, 6))),
    ("qkv", dict(qkv=torch.randn(2, 6, 6))),
    ("qkv", dict(qkv=torch.randn(2, 6, 3, 6))),
    ("up", dict(up=torch.randn(2, 5, 4))),
    ("up", dict(up=torch.randn(2, 6, 4, device="meta"))),
    ("down_bias", dict(down_bias=torch.randn(2, 4))),
    ("qkv_bias", dict(qkv_bias=torch.randn(2, 6))),
    ("up_bias", dict(up_bias=torch.randn(4))),
    ("num_heads", dict(num_heads=4)),
    ("num_heads", dict(num_heads=0)),
    ("num_heads", dict(num_heads=2.0)),
    ("activation", dict(activation="tanh")),
    ("dropout_p", dict(dropout_p=1.0, seed=SEED)),
    ("out_dropout_p", dict(out_dropout_p=(0.1,), seed=SEED)),
    ("out_dropout_p", dict(out_dropout_p=-1, seed=SEED)),
    ("seed", dict(dropout_p=0.1)),
    ("seed", dict(out_dropout_p=0.1)),
    ("cu_seqlens", dict(cu_seqlens=(0, 6))),
    ("cu_seqlens", dict(cu_seqlens=torch.tensor([0, 6]))),
    ("cu_seqlens", dict(cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))),
    ("token_offsets", dict(token_offsets=(0, 4, 3))),
    ("impl", dict(impl="cuda")),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name, wrong", WRONG, ids=[f"{name}-{k}" for k, (name, _) in enumerate(WRONG)])
def test_errors_name_the_argument(impl: Any, name: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(
        x=X, **PARAMETERS, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32), token_offsets=(0, 3, 6), num_heads=2
    )
    with pytest.raises(ValueError, match=f"^{name} must"):
        pal(**{**arguments, "impl": impl, **wrong})


def test_an_explicit_implementation_never_falls_back() -> None:
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="impl='triton' cannot be used here"):
        pal(X, **PARAMETERS, cu_seqlens=cu_seqlens, token_offsets=(0, 3, 6), num_heads=2, impl="triton")
