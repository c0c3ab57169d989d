"""Ordered classes as conditional probabilities (CORN).

The outputs f [E, C - 1] are logits of P(y > k | y > k - 1) for k = 0, ..., C - 2. Their products
are P(y > k), which fall with k whatever the outputs are.
Source: Shi, Cao & Raschka 2021, "Deep Neural Networks for Rank-Consistent Ordinal Regression Based
On Conditional Probabilities", section 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def ordinal_log_probabilities(outputs: Tensor) -> Tensor:
    """Return log P(y = k), [E, C].

    It is the sum of log s(f_j) over j < k, plus log (1 - s(f_k)) for k < C - 1. s: the sigmoid.
    outputs: f, [E, C - 1].
    """
    above = functional.pad(functional.logsigmoid(outputs).cumsum(1), (1, 0))
    return above + functional.pad(functional.logsigmoid(-outputs), (0, 1))
