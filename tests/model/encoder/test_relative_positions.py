"""Encoders with relative positions: random configurations, ZeRO 3, dropout and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import padded_hidden, save_encoder_of
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_batches import build_batch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from fastmtl.config import EncoderConfig
from fastmtl.errors import UserError
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.pretrained import load_encoder
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.sinks.weighted import WeightedSink

LENGTHS = [[5, 1, 17], [], [3, 30]]
CASES = ["mpnet", "deberta-v2", "deberta-v2, other"]
DEBERTA = st.fixed_dictionaries(
    {
        "relative_attention": st.booleans(),
        "pos_att_type": st.sampled_from([["c2p"], ["p2c"], ["p2c", "c2p"]]),
        "share_att_key": st.booleans(),
        "position_biased_input": st.booleans(),
        "type_vocab_size": st.integers(0, 2),
        "norm_rel_ebd": st.sampled_from(["none", "layer_norm"]),
        "max_relative_positions": st.sampled_from([-1, 5, 40, 100]),
        "position_buckets": st.sampled_from([-1, 3, 4, 8, 16]),
        "embedding_size": st.sampled_from([7, 12]),
        "conv_kernel_size": st.sampled_from([0, 1, 3]),
        "conv_groups": st.integers(1, 2),
    }
)


@settings(max_examples=15, deadline=None)
@given(
    kind_and_values=st.one_of(
        st.tuples(st.just("deberta-v2"), DEBERTA),
        st.tuples(st.just("mpnet"), st.fixed_dictionaries({"relative_attention_num_buckets": st.integers(32, 34)})),
    ),
    heads=st.integers(1, 2),
    lengths=st.lists(st.lists(st.integers(1, 70), max_size=2), min_size=1, max_size=3),
)
def test_random_configurations_equal_transformers(
    kind_and_values: tuple[str, dict[str, Any]], heads: int, lengths: list[list[int]]
) -> None:
    """Hidden states, and gradients per task with weights, in float64."""
    kind, values = kind_and_values
    sizes = {
        "vocab_size": 50,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "intermediate_size": 9,
        "layer_norm_eps": 1e-3,
    }
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=heads, max_position_embeddings=80, **values)
    family = FAMILIES[kind]
    try:
        family.check_config(config.to_dict(), Path("config.json"))
    except UserError:
        return
    torch.manual_seed(1)
    theirs = AutoModel.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4 + (parameter.dim() == 1))
    ours = family.encoder(config).double().eval()
    of_theirs, parameters = dict(theirs.named_parameters()), dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(of_theirs[family.file_name(name)])
    batch = build_batch(lengths)
    types = batch.token_type_ids * (ours.settings.type_vocab_size > 1)
    batch = dataclasses.replace(batch, input_ids=batch.input_ids % 48 + 2, token_type_ids=types)
    if not batch.num_tokens:
        assert ours(batch).shape == (0, 12)
        return
    expected = padded_hidden(theirs, batch)
    weights = torch.tensor([1.0, 3.0, -0.5], dtype=torch.float64)[: batch.num_tasks]
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    per_token = weights.repeat_interleave(torch.tensor([b - a for a, b in pairwise(batch.host.token_offsets)]))
    inputs = [of_theirs[family.file_name(name)] for name in parameters]
    exact = torch.autograd.grad(expected, inputs, upstream * per_token[:, None], allow_unused=True)
    sink = WeightedSink(list(parameters.values()), batch.num_tasks, weights)
    with sink.armed(torch.device("cpu")):
        hidden = ours(batch, task_grads=sink)
        found = torch.autograd.grad(hidden, [*parameters.values()], upstream, allow_unused=True)
    assert (hidden - expected).abs().max() <= 1e-10 * expected.abs().max()
    scale = max(gradient.norm() for gradient in exact if gradient is not None)
    for name, ours_one, theirs_one in zip(parameters, found, exact, strict=True):
        zero = torch.zeros_like(parameters[name])
        ours_one, theirs_one = (zero if one is None else one for one in (ours_one, theirs_one))
        assert (ours_one - theirs_one).norm() <= 1e-10 * scale, name


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PackedEncoder]:
    """Return encoder_of(case, dropout=0.0): the encoder of a case of encoder_families.py."""

    def load(case: str, dropout: float = 0.0) -> PackedEncoder:
        directory = save_encoder_of(case, tmp_path_factory.mktemp("encoder"))
        encoder = load_encoder(EncoderConfig(path=str(directory), hidden_dropout=dropout, attention_dropout=dropout))
        assert isinstance(encoder, PackedEncoder)
        return encoder

    return load


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_read_only_while_their_module_runs(case: str, encoder_of: Callable[..., PackedEncoder]) -> None:
    """Outside they have no storage, as under ZeRO 3."""
    encoder, batch = encoder_of(case), build_batch(LENGTHS)
    encoder.pooler = None
    expected = encoder(batch).detach()
    kept = {parameter: parameter.data for parameter in encoder.parameters()}

    def gather(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept[parameter]

    def release(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in encoder.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    assert torch.equal(encoder(batch), expected)


@pytest.mark.parametrize("case", CASES)
def test_dropout_is_the_same_with_and_without_task_gradients(
    case: str, encoder_of: Callable[..., PackedEncoder]
) -> None:
    """All copies of a table have the mask of the one table of a joint step."""
    encoder, batch = encoder_of(case, 0.3), build_batch(LENGTHS)
    sink = StackSink(list(encoder.parameters()), batch.num_tasks, sparse=[encoder.words])
    torch.manual_seed(3)
    joint = encoder(batch)
    torch.manual_seed(3)
    with sink.armed(torch.device("cpu")):
        per_task = encoder(batch, task_grads=sink)
    torch.testing.assert_close(per_task, joint, rtol=0, atol=1e-6)
    torch.manual_seed(4)
    assert not torch.allclose(encoder(batch), joint, atol=1e-3)


def test_a_table_of_positions_that_v3_does_not_use_is_left_out(tmp_path: Path) -> None:
    directory = save_encoder_of("deberta-v2", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["deberta.embeddings.position_embeddings.weight"] = torch.ones(80, 32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(EncoderConfig(path=str(directory)))
    assert not any("position_embeddings" in name for name in encoder.state_dict())
