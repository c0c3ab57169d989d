"""Linear, LayerNorm and embedding whose backward can write one gradient per task.

Shapes: N rows of T tasks; task t has the rows segments.host[t]:segments.host[t + 1]. If
`task_grads` is None or not armed, these are torch's own operations. A sink that is armed in forward
must be armed in backward too.

Rows of different tasks never mix. So in one backward of sum_t L_t, the rows of task t carry exactly
the gradient of L_t: dW_t = dY[segment t]^T X[segment t]. The T gradients cost as much as one.

Each operation has a file in fastmtl/surgery/rules.
"""

from __future__ import annotations

from fastmtl.surgery.rules.embedding import embedding
from fastmtl.surgery.rules.layer_norm import layer_norm
from fastmtl.surgery.rules.linear import linear

__all__ = ["embedding", "layer_norm", "linear"]
