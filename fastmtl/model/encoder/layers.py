"""Linear, LayerNorm and Embedding layers whose backward can compute one gradient per task.

The rows of a layer's input are ordered by task. Parameter names, shapes and initialisation are
those of nn.Linear, nn.LayerNorm and nn.Embedding, and so are the results. If the forward has an
armed sink of task gradients, backward writes the T gradients of each parameter into the sink
instead of `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastmtl.model.encoder.context import ForwardContext, SegmentContext
from fastmtl.model.owners import Owner, within
from fastmtl.surgery import functional
from fastmtl.surgery.rules.projections import projections
from fastmtl_kernels import add_layer_norm, dropout


class TaskLinear(nn.Linear):
    weight: nn.Parameter

    def forward(self, x: Tensor, context: SegmentContext) -> Tensor:  # type: ignore[override]
        """Map [N, in_features] to [N, out_features]; a LoRA of the context adds its term."""
        y = functional.linear(x, self.weight, self.bias, context.segments, context.task_grads)
        term = context.term(self, x)
        return y if term is None else y.add_(term)


class Projection(Owner, nn.Linear):  # type: ignore[misc]
    """Weights of one of several Linears with a common input, such as query, key and value.

    One operation computes all their outputs, side by side in one tensor (see bert_layer.py).
    """

    weight: nn.Parameter
    bias: nn.Parameter


def project(parts: Sequence[Projection], x: Tensor, context: SegmentContext) -> Tensor:
    """Map x [N, in] by k Linears of one input to [N, k, out]; a LoRA of the context adds terms."""

    def call(x: Tensor) -> Tensor:
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        terms = {i: term for i, part in enumerate(parts) if (term := context.term(part, x)) is not None}
        return projections(x, weights, biases, context.segments, context.task_grads, terms)

    return within(parts, x, call)


# (x [N, d], weight [d], bias [d], [d] as a list, eps) -> LayerNorm of each row [N, d].
Norm = Callable[[Tensor, Tensor, Tensor, list[int], float], Tensor]


class TaskLayerNorm(Owner, nn.LayerNorm):  # type: ignore[misc]
    """LayerNorm of the embeddings (see bert.py).

    norm_override: the LayerNorm of another library, used instead of fastmtl's if it is set. It
    computes no gradient per task.
    """

    norm_override: Norm | None = None


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x) + ts).

    ts: the output of the layer's adapter, if there is one.
    at: which of the layer's dropouts it is (context.py). p: the dropout rate in training.
    norm_override: as in TaskLayerNorm.
    """

    norm_override: Norm | None = None

    def __init__(self, size: int, *, eps: float, p: float, at: int) -> None:
        super().__init__(size, eps=eps)
        self.p, self.at = p, at

    def forward(  # type: ignore[override]
        self, residual: Tensor, x: Tensor, ts: Tensor | None, context: ForwardContext
    ) -> Tensor:
        """Map residual, x and ts, each [N, d], to [N, d] in the dtype of the residual."""
        p, seed = self.p if self.training else 0.0, context.seed(self.at)
        if self.norm_override is not None:
            z = residual + (dropout(x, p, seed) if p else x)
            z = z if ts is None else z + ts
            return self.norm_override(z, self.weight, self.bias, list(self.weight.shape), self.eps).to(residual.dtype)
        return add_layer_norm(
            residual,
            x,
            self.weight,
            self.bias,
            ts=ts,
            dropout_p=p,
            eps=self.eps,
            seed=seed,
            token_offsets=context.segments,
            task_grads=context.armed,
            register=None if context.recomputed is None else context.recomputed.register,
        )


def overrides_norm(module: nn.Module) -> bool:
    """Return True if a LayerNorm inside `module` is that of another library (`norm_override`)."""
    norms = (part for part in module.modules() if isinstance(part, TaskLayerNorm | AddLayerNorm))
    return any(norm.norm_override is not None for norm in norms)


class TaskEmbedding(Owner, nn.Embedding):  # type: ignore[misc]
    """Weights of an embedding table; `Embeddings` in bert.py does the lookup.

    padding_idx has no effect, because a packed batch has no padding.
    """

    weight: nn.Parameter
