"""The shared layers: torch's own modules whose rows belong to tasks.

Names, shapes and initialisation are those of nn.Linear, nn.LayerNorm and nn.Embedding. Without an armed
`TaskGradients` they compute what those compute; with one, their backward writes one gradient per task into it.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.model.context import ForwardContext
from fastmtl.surgery import functional


class TaskLinear(nn.Linear):
    weight: nn.Parameter

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        """[N, in_features] -> [N, out_features]."""
        return functional.linear(x, self.weight, self.bias, context.segments, context.task_grads)


class TaskLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        """[N, d] -> [N, d]."""
        return functional.layer_norm(x, self.weight, self.bias, self.eps, context.segments, context.task_grads)


class TaskEmbedding(nn.Embedding):
    weight: nn.Parameter

    def forward(self, ids: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        """int64 [N] -> [N, embedding_dim]. A padding index has no meaning here: a packed batch holds no padding."""
        return functional.embedding(ids, self.weight, context.segments, context.task_grads)
