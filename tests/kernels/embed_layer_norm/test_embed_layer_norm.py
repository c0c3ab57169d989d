"""embed_layer_norm on CPUs: the oracle against transformers, the kernels against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embed_layer_norm_cases import Case, cases, check
from hypothesis import given, settings
from row_cases import RecordingSink

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.embed_layer_norm.api import embed_layer_norm
from fastmtl_kernels.philox import keep_mask

REASON = unsupported_reason("embed_layer_norm", "cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]


def inputs(num_rows: int = 23) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(40, (num_rows,), generator=generator),
        "position_ids": torch.randint(30, (num_rows,), generator=generator),
        "token_type_ids": torch.randint(2, (num_rows,), generator=generator),
        "words": torch.randn(40, 12, generator=generator),
        "positions": torch.randn(30, 12, generator=generator),
        "types": torch.randn(2, 12, generator=generator),
        "weight": torch.randn(12, generator=generator),
        "bias": torch.randn(12, generator=generator),
    }


@pytest.mark.parametrize("impl", IMPLS)
def test_as_transformers(impl: Any) -> None:
    """Output and all gradients equal those of BertEmbeddings with the same weights."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(vocab_size=40, hidden_size=12, max_position_embeddings=30, pad_token_id=None)
    theirs = BertEmbeddings(config).eval()
    ours = inputs()
    names = {
        "words": theirs.word_embeddings.weight, "positions": theirs.position_embeddings.weight,
        "types": theirs.token_type_embeddings.weight, "weight": theirs.LayerNorm.weight, "bias": theirs.LayerNorm.bias,
    }  # fmt: skip
    for name, parameter in names.items():
        parameter.data.copy_(ours[name])
        ours[name].requires_grad_()
    expected = theirs(*(ours[name][None] for name in ("input_ids", "token_type_ids", "position_ids")))[0]
    found = embed_layer_norm(**ours, eps=config.layer_norm_eps, impl=impl)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(dy)
    found.backward(dy)
    for name, parameter in names.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS[1:])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_case(impl: Any, case: Case) -> None:
    check(case, impl)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_width_of_an_encoder(impl: Any) -> None:
    check(Case((150, 64, 131), 3, 384, torch.float32, torch.int64, "dense", 0.1, True, 3), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_that_of_the_definition(impl: Any) -> None:
    seed = torch.tensor([99])
    plain = embed_layer_norm(**inputs(), impl=impl)
    dropped = embed_layer_norm(**inputs(), dropout_p=0.4, seed=seed, impl=impl)
    torch.testing.assert_close(dropped, plain * keep_mask(seed, 23, 12, 0.4) / 0.6)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_anchor_reaches_every_parameter(impl: Any) -> None:
    """Asking autograd for the anchor alone runs the backward that fills the sink."""
    arguments, sink = inputs(), RecordingSink()
    for name in ("words", "weight"):
        arguments[name].requires_grad_()
    y = embed_layer_norm(**arguments, token_offsets=(0, 20, 23), task_grads=sink, impl=impl)
    (anchor,) = torch.autograd.grad(y.square().sum(), sink.anchor)
    assert anchor == 0
    assert list(sink.dense) == [id(arguments["weight"])] and list(sink.rows) == [id(arguments["words"])]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("input_ids", dict(input_ids=torch.zeros(23))),
    ("input_ids", dict(input_ids=torch.zeros(1, 23, dtype=torch.int64))),
    ("position_ids", dict(position_ids=torch.zeros(22, dtype=torch.int64))),
    ("token_type_ids", dict(token_type_ids=None)),
    ("words", dict(words=torch.zeros(40))),
    ("words", dict(words=torch.zeros(40, 12, dtype=torch.int64))),
    ("positions", dict(positions=torch.zeros(30, 11))),
    ("types", dict(types=torch.zeros(2, 12, device="meta"))),
    ("types", dict(types=torch.zeros(0, 12))),
    ("weight", dict(weight=torch.zeros(11))),
    ("types", dict(types=None)),
    ("bias", dict(bias=torch.zeros(12, dtype=torch.int64))),
    ("dropout_p", dict(dropout_p=-0.1)),
    ("seed", dict(dropout_p=0.1)),
    ("token_offsets", dict(token_offsets=(0, 24))),
    ("token_offsets", dict(task_grads=RecordingSink())),
    ("impl", dict(impl="cuda")),
]


@pytest.mark.parametrize("name, wrong", WRONG, ids=[f"{name}-{k}" for k, (name, _) in enumerate(WRONG)])
def test_errors_name_the_argument(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        embed_layer_norm(**{**inputs(), **wrong})
