"""The shared layers of an encoder: torch's modules for rows that belong to tasks.

Names, shapes and initialisation are those of nn.Linear, nn.LayerNorm and nn.Embedding. Without an
armed sink of task gradients these layers compute what torch's compute. With one, their backward
writes one gradient per task into the sink.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastmtl.model.encoder.context import ForwardContext, SegmentContext
from fastmtl.model.owners import Owner
from fastmtl.surgery import functional
from fastmtl_kernels import add_layer_norm, dropout


class TaskLinear(nn.Linear):
    weight: nn.Parameter

    def forward(self, x: Tensor, context: SegmentContext) -> Tensor:  # type: ignore[override]
        """Map [N, in_features] to [N, out_features]."""
        return functional.linear(x, self.weight, self.bias, context.segments, context.task_grads)


class Projection(Owner, nn.Linear):  # type: ignore[misc]
    """One of several Linears that read one input and write side by side (see bert_layer.py)."""

    weight: nn.Parameter
    bias: nn.Parameter


# x [N, d], weight [d], bias [d], [d], eps -> [N, d].
Norm = Callable[[Tensor, Tensor, Tensor, list[int], float], Tensor]


class TaskLayerNorm(Owner, nn.LayerNorm):  # type: ignore[misc]
    """LayerNorm of the embeddings (see bert.py).

    norm_override: the LayerNorm of another library, which replaces fastmtl's. It writes no gradient
    per task.
    """

    norm_override: Norm | None = None


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x) + ts).

    at: the place of the dropout seed in the context. p: the dropout rate in training.
    norm_override: as in TaskLayerNorm.
    """

    norm_override: Norm | None = None

    def __init__(self, size: int, *, eps: float, p: float, at: int) -> None:
        super().__init__(size, eps=eps)
        self.p, self.at = p, at

    def forward(  # type: ignore[override]
        self, residual: Tensor, x: Tensor, ts: Tensor | None, context: ForwardContext
    ) -> Tensor:
        """Map [N, d] each to [N, d] of the residual's dtype."""
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
    """Return whether some LayerNorm inside is another library's (`norm_override`)."""
    norms = (part for part in module.modules() if isinstance(part, TaskLayerNorm | AddLayerNorm))
    return any(norm.norm_override is not None for norm in norms)


class TaskEmbedding(Owner, nn.Embedding):  # type: ignore[misc]
    """nn.Embedding without a meaning for padding_idx: a packed batch holds no padding."""

    weight: nn.Parameter
