"""ModernBERT: random small encoders against transformers, rotations, adapters and noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import padded_hidden, save_encoder_of
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_batches import build_batch, build_model
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.encoder.modernbert import WHOLE, WINDOWED, PackedModernBert, rope_thetas
from fastmtl.model.encoder.rotations import rotation_table
from fastmtl.surgery.sinks.stack import StackSink

MakeBatch = Callable[..., PackedBatch]
IDS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 70,
    "local_attention": 11,
    **IDS,
}


def twins(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[PackedModernBert, ModernBertModel]:
    """Return both models of a configuration with the same random weights, without dropout."""
    torch.manual_seed(0)
    config = ModernBertConfig(**values)
    theirs = ModernBertModel(config)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    nn.Module.to(theirs, dtype).eval()
    ours = PackedModernBert(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([2, 6, 16]),
    layers=st.integers(1, 4),
    inner=st.integers(1, 40),
    local=st.integers(2, 40),
    every=st.sampled_from([1, 2, 3]),
    biases=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_pytorch_tanh", "relu"]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_small_encoder(
    heads: int, head_dim: int, layers: int, inner: int, local: int, every: int, biases: bool, activation: str,
    lengths: list[int], dtype: torch.dtype,
) -> None:  # fmt: skip
    sizes = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_hidden_layers": layers}
    sizes |= {"intermediate_size": inner, "local_attention": local, "global_attn_every_n_layers": every}
    options = {"attention_bias": biases, "mlp_bias": biases, "hidden_activation": activation}
    ours, theirs = twins({**SMALL, **sizes, **options}, dtype)
    batch, tolerance = build_batch([lengths]), 1e-5 if dtype == torch.float32 else 1e-10
    hidden, expected = ours(batch), padded_hidden(theirs, batch)
    assert (hidden - expected).abs().max() <= tolerance * expected.abs().max()
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    hidden.backward(upstream)
    expected.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    scale = max(gradient.norm() for gradient in gradients.values() if gradient is not None)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and gradients[name] is not None
        assert (parameter.grad - gradients[name]).norm() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotations_have_the_bits_of_transformers(dtype: torch.dtype) -> None:
    config = ModernBertConfig(**{**SMALL, "hidden_size": 768, "num_attention_heads": 12})
    rotary, places = ModernBertRotaryEmbedding(config), torch.arange(8192)[None]
    for kind in (WHOLE, WINDOWED):
        found = rotation_table(rope_thetas(config)[kind], 64, 8192, dtype, torch.device("cpu"))
        for part, expected in zip(found, rotary(torch.zeros(1, dtype=dtype), places, kind), strict=True):
            assert torch.equal(part, expected[0, :, :32].to(part.dtype))


class Term:
    """An adapter without weights: TS(h) = h / 2."""

    training = False
    top = None

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return hidden / 2


def test_an_adapters_term_and_noise_are_added_where_they_belong(make_batch: MakeBatch) -> None:
    ours, theirs = twins(SMALL)
    batch = make_batch([[7, 30]])
    noise = torch.randn(37, 24, generator=torch.Generator().manual_seed(2))
    found = ours(batch, adapter=Term(), noise=noise)
    padded_noise = torch.nn.utils.rnn.pad_sequence(noise.split([7, 30]), batch_first=True)
    theirs.embeddings.register_forward_hook(lambda _module, _args, out: out + padded_noise)
    for layer in theirs.layers:
        layer.register_forward_hook(lambda _module, args, out: out + args[0] / 2)
    torch.testing.assert_close(found, padded_hidden(theirs, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recompute", "adapter"),
    [
        ("cheap", {"name": "pal", "size": 12, "heads": 4}),
        ("full", {"name": "low_rank", "size": 6, "heads": 2, "top": "layer"}),
        ("none", {"name": "lora", "size": 3}),
    ],
    ids=["pal", "low_rank", "lora"],
)
def test_one_backward_gives_every_tasks_gradient_with_adapters(
    recompute: str, adapter: dict[str, Any], tmp_path: Path, make_batch: MakeBatch
) -> None:
    encoder = save_encoder_of("modernbert", tmp_path / "encoder")
    model = build_model(encoder, adapter=adapter, encoder={"recompute": recompute})
    batch = make_batch([[5, 1, 29], [7, 12], [6, 3, 8, 8]], pairs=[False, False, True])
    shared, seed = model.shared_parameters(), 4
    sink = StackSink(shared, 3)
    torch.manual_seed(seed)
    with sink.armed(torch.device("cpu")):
        torch.autograd.grad(sum(loss for loss, _ in model(batch, sink).values()), [sink.anchor])
    sink.gramian()
    torch.manual_seed(seed)
    for task, (loss, _) in enumerate(model(batch).values()):
        expected = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        found = [sink.task_gradient(parameter, task) for parameter in shared]
        scale = max(gradient.norm() for gradient in expected if gradient is not None)
        for ours, wanted in zip(found, expected, strict=True):
            if wanted is not None:
                assert ours is not None and (ours - wanted).norm() <= 1e-5 * scale


def test_apexs_layer_norm_is_refused() -> None:
    with pytest.raises(UserError, match="encoder.layer_norm: apex needs a bias"):
        twins(SMALL)[0].use_layer_norm(nn.functional.layer_norm)  # type: ignore[arg-type]
