"""One layer of BERT on packed sequences: attention, feed-forward part, LayerNorms."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import BertConfig
from transformers.activations import ACT2FN

from fastmtl.model.encoder.context import ATTENTION, ATTENTION_OUTPUT, OUTPUT, ForwardContext, place
from fastmtl.model.encoder.layers import AddLayerNorm, Projection, TaskLinear
from fastmtl.model.owners import within
from fastmtl.surgery.rules.projections import projections

# Activations whose backward reads their result. Autograd keeps such a result in any case, so there
# is no gain in computing it again.
_BACKWARD_READS_RESULT = ("relu", "sigmoid", "tanh")


class Layer(nn.Module):
    """One layer: h' = LN(h + MHA(h)), and its output LN(h' + FFN(h') + TS(h)).

    TS(h) is the task-specific output of an adapter, left out if the layer has none.
    index: the layer's number, from 0; it determines the places of the dropout seeds (context.py).
    """

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, index)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config, place(index, OUTPUT))

    def forward(self, hidden: Tensor, task_specific: Tensor | None, context: ForwardContext) -> Tensor:
        """Map hidden states h [N, d] to [N, d]. task_specific: TS(h) [N, d], or None."""
        attended = self.attention(hidden, context)
        return self.output(self.intermediate(attended, context), attended, task_specific, context)


class Attention(nn.Module):
    """Attention sublayer: LN(h + dropout(W MHA(h) + b))."""

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, place(index, ATTENTION))
        self.output = Output(config.hidden_size, config, place(index, ATTENTION_OUTPUT))

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.output(self.self(hidden, context), hidden, None, context)


class SelfAttention(nn.Module):
    """Multi-head attention within each sequence. at: place of its dropout seed (context.py)."""

    def __init__(self, config: BertConfig, at: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.at = at
        self.dropout = config.attention_probs_dropout_prob
        self.query = Projection(config.hidden_size, config.hidden_size)
        self.key = Projection(config.hidden_size, config.hidden_size)
        self.value = Projection(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        parts = self.query, self.key, self.value

        def project(hidden: Tensor) -> Tensor:
            weights, biases = [part.weight for part in parts], [part.bias for part in parts]
            return projections(hidden, weights, biases, context.segments, context.task_grads)

        qkv = within(parts, hidden, project)
        return context.attend(qkv, self.num_heads, self.dropout if self.training else 0.0, self.at)


class Intermediate(nn.Module):
    """First half of the feed-forward part: activation(W x + b)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = TaskLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.backward_reads_result = config.hidden_act in _BACKWARD_READS_RESULT

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        before = self.dense(hidden, context)
        result = self.activation(before)
        if context.recomputed is not None and result.requires_grad and not self.backward_reads_result:
            context.recomputed.register(result, partial(self.activation, before.detach()))
        return result


class Output(nn.Module):
    """End of the attention and of the feed-forward part: LN(residual + dropout(W x + b) + ts)."""

    def __init__(self, in_features: int, config: BertConfig, at: int) -> None:
        super().__init__()
        self.dense = TaskLinear(in_features, config.hidden_size)
        p, eps = config.hidden_dropout_prob, config.layer_norm_eps
        self.LayerNorm = AddLayerNorm(config.hidden_size, eps=eps, p=p, at=at)

    def forward(self, x: Tensor, residual: Tensor, ts: Tensor | None, context: ForwardContext) -> Tensor:
        return self.LayerNorm(residual, self.dense(x, context), ts, context)
