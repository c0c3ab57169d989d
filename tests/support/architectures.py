"""Public architectures and small nets in random small sizes, each with a batch for it.

`build(name, seed)` draws sizes, weights and inputs from the seed. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trunk_examples import Draw, Example, Inputs


def states(trunk: nn.Module, inputs: Inputs) -> Tensor:
    """Return the mean of a row's last states where its mask is 1, plus any pooler's output."""
    output = trunk(**inputs)
    mask = inputs["attention_mask"].unsqueeze(2)
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    pooled = getattr(output, "pooler_output", None)
    return mean if pooled is None else mean + pooled


def images(trunk: nn.Module, inputs: Inputs) -> Tensor:
    output = trunk(**inputs)
    return output.last_hidden_state.mean(1) + output.pooler_output


def bert(draw: Draw) -> Example:
    from transformers import BertConfig, BertModel

    trunk = BertModel(BertConfig(**draw.sizes(), **draw.dropouts()))
    return draw.example(trunk, {**draw.tokens_and_mask(), **draw.types()}, states)


def bert_tied(draw: Draw) -> Example:
    """BERT with a masked-language head, whose decoder is the table of the words."""
    from transformers import BertConfig, BertForMaskedLM

    def features(trunk: nn.Module, inputs: Inputs) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(2)
        return (trunk(**inputs).logits * mask).sum(1) / mask.sum(1)

    trunk = BertForMaskedLM(BertConfig(**draw.sizes(), **draw.dropouts()))
    return draw.example(trunk, draw.tokens_and_mask(), features, draw.vocab)


def roberta(draw: Draw) -> Example:
    from transformers import RobertaConfig, RobertaModel

    trunk = RobertaModel(RobertaConfig(**draw.sizes(), **draw.dropouts()))
    return draw.example(trunk, draw.tokens_and_mask(), states)


def distilbert(draw: Draw) -> Example:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=draw.vocab,
        dim=draw.hidden,
        hidden_dim=draw.inner,
        n_layers=draw.layers,
        n_heads=draw.heads,
        max_position_embeddings=12,
        sinusoidal_pos_embds=draw.one_of(True, False),
        dropout=draw.dropout,
        attention_dropout=draw.dropout,
    )
    return draw.example(DistilBertModel(config), draw.tokens_and_mask(), states)


def electra(draw: Draw) -> Example:
    from transformers import ElectraConfig, ElectraModel

    size = draw.one_of(draw.hidden, 5)  # another size adds a projection of the embeddings
    trunk = ElectraModel(ElectraConfig(**draw.sizes(), **draw.dropouts(), embedding_size=size))
    return draw.example(trunk, {**draw.tokens_and_mask(), **draw.types()}, states)


def albert(draw: Draw) -> Example:
    """ALBERT, whose layers share their weights over depth."""
    from transformers import AlbertConfig, AlbertModel

    sizes = draw.sizes() | {"num_hidden_layers": 3, "embedding_size": 5}
    config = AlbertConfig(**sizes, **draw.dropouts(), inner_group_num=draw.one_of(1, 2))
    return draw.example(AlbertModel(config), {**draw.tokens_and_mask(), **draw.types()}, states)


def mpnet(draw: Draw) -> Example:
    from transformers import MPNetConfig, MPNetModel

    trunk = MPNetModel(MPNetConfig(**draw.sizes() | {"pad_token_id": 1}, **draw.dropouts()))
    return draw.example(trunk, draw.tokens_and_mask(), states, draws=True)


def deberta_v2(draw: Draw) -> Example:
    from transformers import DebertaV2Config, DebertaV2Model

    options = {
        "relative_attention": True,
        "max_relative_positions": 8,
        "position_buckets": draw.one_of(-1, 4),
        "position_biased_input": draw.one_of(True, False),
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": draw.one_of(True, False),
        "norm_rel_ebd": draw.one_of("none", "layer_norm"),
        "type_vocab_size": draw.one_of(0, 2),
        "conv_kernel_size": draw.one_of(0, 3),
    }
    config = DebertaV2Config(**draw.sizes(), **draw.dropouts(), **options)
    return draw.example(DebertaV2Model(config), draw.tokens_and_mask(), states, draws=True)


def modernbert(draw: Draw) -> Example:
    from transformers import ModernBertConfig, ModernBertModel

    specials = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes = draw.sizes() | specials | {"num_hidden_layers": 3, "local_attention": 4}
    dropouts: dict[str, Any] = {f"{part}_dropout": draw.dropout for part in ("attention", "embedding", "mlp")}
    config = ModernBertConfig(**sizes, **dropouts, norm_bias=draw.one_of(True, False))
    config._attn_implementation = "sdpa"
    return draw.example(ModernBertModel(config), draw.tokens_and_mask(), states)


def llama_trunk(draw: Draw) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    biases: dict[str, Any] = {"attention_bias": draw.one_of(True, False), "attention_dropout": draw.dropout}
    return LlamaModel(LlamaConfig(**draw.sizes(), **biases, num_key_value_heads=draw.heads // 2))


def llama(draw: Draw) -> Example:
    return draw.example(llama_trunk(draw), draw.tokens_and_mask(), states)


def llama_lora(draw: Draw) -> Example:
    """Llama whose trained parameters are those of LoRA, on a frozen trunk."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=draw.one_of(1, 3), target_modules=targets, lora_dropout=draw.dropout)
    return draw.example(peft.get_peft_model(llama_trunk(draw), config), draw.tokens_and_mask(), states)


def qwen2(draw: Draw) -> Example:
    from transformers import Qwen2Config, Qwen2Model

    kinds: dict[str, Any] = {"num_key_value_heads": 1, "use_cache": False, "attention_dropout": draw.dropout}
    trunk = Qwen2Model(Qwen2Config(**draw.sizes(), **kinds))
    return draw.example(trunk, draw.tokens_and_mask(), states)


def gpt2(draw: Draw) -> Example:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=draw.vocab,
        n_embd=draw.hidden,
        n_inner=draw.inner,
        n_layer=draw.layers,
        n_head=draw.heads,
        n_positions=12,
        embd_pdrop=draw.dropout,
        attn_pdrop=draw.dropout,
        resid_pdrop=draw.dropout,
        bos_token_id=1,
        eos_token_id=2,
    )
    return draw.example(GPT2Model(config), draw.tokens_and_mask(), states)


def t5(draw: Draw) -> Example:
    """T5's encoder; every layer uses the bias table of the first."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=draw.vocab,
        d_model=draw.hidden,
        d_kv=draw.one_of(3, 4),
        d_ff=draw.inner,
        num_layers=2,
        num_heads=draw.heads,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj=draw.one_of("relu", "gated-gelu"),
        dropout_rate=draw.dropout,
    )
    return draw.example(T5EncoderModel(config), draw.tokens_and_mask(), states, draws=True)


def umt5(draw: Draw) -> Example:
    """UMT5's encoder; every layer has a bias table of its own."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes: dict[str, Any] = {"d_kv": draw.one_of(3, 4), "d_ff": draw.inner, "num_heads": draw.heads}
    biases: dict[str, Any] = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    config = UMT5Config(
        vocab_size=draw.vocab, d_model=draw.hidden, num_layers=2, **sizes, **biases, dropout_rate=draw.dropout
    )
    return draw.example(UMT5EncoderModel(config), draw.tokens_and_mask(), states, draws=True)


def funnel(draw: Draw) -> Example:
    """Funnel, whose layers project a table of relative positions and pool the tokens."""
    from transformers import FunnelConfig, FunnelModel

    sizes: dict[str, Any] = {
        "d_model": draw.hidden,
        "n_head": draw.heads,
        "d_head": draw.one_of(3, 4),
        "d_inner": draw.inner,
    }
    rates: dict[str, Any] = {"hidden_dropout": draw.dropout, "attention_dropout": draw.dropout}
    kind = draw.one_of("relative_shift", "factorized")
    config = FunnelConfig(
        vocab_size=draw.vocab, block_sizes=[1, 1], num_decoder_layers=1, attention_type=kind, **sizes, **rates
    )
    return draw.example(FunnelModel(config), draw.tokens_and_mask(), states, draws=True)


def convbert(draw: Draw) -> Example:
    """ConvBERT, with convolutions over tokens and a bias of its own in one of them."""
    from transformers import ConvBertConfig, ConvBertModel

    config = ConvBertConfig(**draw.sizes(), **draw.dropouts(), embedding_size=draw.hidden, head_ratio=1)
    return draw.example(ConvBertModel(config), {**draw.tokens_and_mask(), **draw.types()}, states)


def vit(draw: Draw) -> Example:
    from transformers import ViTConfig, ViTModel

    sizes = {name: value for name, value in draw.sizes().items() if name not in ("vocab_size", "pad_token_id")}
    config = ViTConfig(**sizes | draw.dropouts(), image_size=8, patch_size=4, num_channels=draw.one_of(1, 3))
    pixels = torch.from_numpy(draw.random.standard_normal((draw.rows, config.num_channels, 8, 8), np.float32))
    return draw.example(ViTModel(config), {"pixel_values": pixels}, images, draws=True)


def convnet(draw: Draw) -> Example:
    """Convolutions with stride, padding, dilation and groups, and GroupNorm."""
    channels, groups = draw.one_of(4, 8), draw.one_of(1, 2)
    same, circular = {"padding": "same"}, {"padding": (0, 1), "padding_mode": "circular"}
    trunk = nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=draw.one_of(1, 2), padding=1, bias=draw.one_of(True, False)),
        nn.GroupNorm(draw.one_of(1, 2), channels),
        nn.GELU(),
        nn.Dropout(draw.dropout),
        nn.Conv2d(channels, 6, (1, 3), **draw.one_of(same, circular), dilation=(1, 2), groups=groups),
        nn.GroupNorm(3, 6),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    pixels = torch.from_numpy(draw.random.standard_normal((draw.rows, 3, 9, 10), np.float32))
    return draw.example(trunk, {"x": pixels}, lambda trunk, inputs: trunk(inputs["x"]), 6)


def transformer_layers(draw: Draw) -> Example:
    """torch's TransformerEncoder; nn.MultiheadAttention runs once per task."""
    layer = nn.TransformerEncoderLayer(
        draw.hidden, draw.heads, draw.inner, draw.dropout, batch_first=True, norm_first=draw.one_of(True, False)
    )
    trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.from_numpy(draw.random.standard_normal((draw.rows, draw.tokens, draw.hidden), np.float32))
    mask = draw.tokens_and_mask()["attention_mask"]

    def features(trunk: nn.Module, inputs: Inputs) -> Tensor:
        states = trunk(inputs["x"], src_key_padding_mask=inputs["mask"] == 0)
        return (states * inputs["mask"].unsqueeze(2)).sum(1)

    return draw.example(trunk, {"x": x, "mask": mask}, features, draws=True)


BUILDERS: dict[str, Callable[[Draw], Example]] = {
    build.__name__: build
    for build in (
        bert,
        bert_tied,
        roberta,
        distilbert,
        electra,
        albert,
        mpnet,
        deberta_v2,
        modernbert,
        llama,
        llama_lora,
        qwen2,
        gpt2,
        t5,
        umt5,
        funnel,
        convbert,
        vit,
        convnet,
        transformer_layers,
    )
}


def build(name: str, seed: int, *, rows: int | None = None, dropout: float = 0.2) -> Example:
    """Return the architecture of this name; weights and inputs are float32. rows: B, or drawn."""
    torch.manual_seed(seed)
    return BUILDERS[name](Draw(seed, rows=rows, dropout=dropout))
