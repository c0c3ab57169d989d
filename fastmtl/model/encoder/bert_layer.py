"""One layer of BERT on packed sequences: attention, feed-forward part, LayerNorms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from transformers.activations import ACT2FN

from fastmtl.model.encoder.context import ATTENTION_OUTPUT, OUTPUT, ForwardContext
from fastmtl.model.encoder.layers import AddLayerNorm, Projection, TaskLinear, project
from fastmtl.model.encoder.settings import EncoderSettings

# Activations whose backward reads their result. Autograd keeps such a result in any case, so there
# is no gain in computing it again.
_BACKWARD_READS_RESULT = ("relu", "sigmoid", "tanh")


def activation_of(name: str) -> nn.Module:
    """Return the activation with this name in transformers' ACT2FN.

    transformers computes `gelu_new` in eight operations; torch has the same function in one.
    """
    return nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]


class Layer(nn.Module):
    """One layer: h' = LN(h + MHA(h)), and its output LN(h' + FFN(h') + TS(h)).

    TS(h) is the task-specific output of an adapter, left out if the layer has none.
    self_attention: the class of MHA; None for SelfAttention.
    """

    def __init__(
        self, settings: EncoderSettings, self_attention: Callable[[EncoderSettings], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(settings, self_attention or SelfAttention)
        self.intermediate = Intermediate(settings)
        self.output = Output(settings.intermediate_size, settings, OUTPUT, settings.sublayer_dropout_probs[1])

    def forward(self, hidden: Tensor, task_specific: Tensor | None, context: ForwardContext) -> Tensor:
        """Map hidden states h [N, d] to [N, d]. task_specific: TS(h) [N, d], or None."""
        attended = self.attention(hidden, context)
        return self.output(self.intermediate(attended, context), attended, task_specific, context)


class Attention(nn.Module):
    """Attention sublayer: LN(h + dropout(W MHA(h) + b))."""

    def __init__(self, settings: EncoderSettings, self_attention: Callable[[EncoderSettings], nn.Module]) -> None:
        super().__init__()
        self.self = self_attention(settings)
        self.output = Output(settings.hidden_size, settings, ATTENTION_OUTPUT, settings.sublayer_dropout_probs[0])

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.output(self.self(hidden, context), hidden, None, context)


class SelfAttention(nn.Module):
    """Multi-head attention within each sequence."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.num_heads = settings.num_attention_heads
        self.dropout = settings.attention_probs_dropout_prob
        self.query = Projection(settings.hidden_size, settings.hidden_size)
        self.key = Projection(settings.hidden_size, settings.hidden_size)
        self.value = Projection(settings.hidden_size, settings.hidden_size)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.attend(project((self.query, self.key, self.value), hidden, context), context)

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """Map queries, keys and values [N, 3, d] to the mixed values [N, d]."""
        return context.attend(qkv, self.num_heads, self.dropout if self.training else 0.0)


class Intermediate(nn.Module):
    """First half of the feed-forward part: activation(W x + b)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.dense = TaskLinear(settings.hidden_size, settings.intermediate_size)
        self.activation = activation_of(settings.hidden_act)
        self.backward_reads_result = settings.hidden_act in _BACKWARD_READS_RESULT

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        before = self.dense(hidden, context)
        result = self.activation(before)
        if context.recomputed is not None and result.requires_grad and not self.backward_reads_result:
            context.recomputed.register(result, partial(self.activation, before.detach()))
        return result


class Output(nn.Module):
    """End of the attention and of the feed-forward part: LN(residual + dropout(W x + b) + ts)."""

    def __init__(self, in_features: int, settings: EncoderSettings, at: int, p: float) -> None:
        super().__init__()
        self.dense = TaskLinear(in_features, settings.hidden_size)
        self.LayerNorm = AddLayerNorm(settings.hidden_size, eps=settings.layer_norm_eps, p=p, at=at)

    def forward(self, x: Tensor, residual: Tensor, ts: Tensor | None, context: ForwardContext) -> Tensor:
        return self.LayerNorm(residual, self.dense(x, context), ts, context)
