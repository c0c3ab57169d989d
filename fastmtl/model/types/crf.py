"""Linear-chain conditional random field over the units of each example.

The score of the tags y_1 ... y_n of an example is

    s(y) = start[y_1] + sum_t x[t, y_t] + sum_t transitions[y_t, y_t+1] + end[y_n]

and p(y) = exp(s(y)) / Z, where Z sums over all C^n sequences. The loss of an example is
- log sum_y p(y) over the sequences y that have its labels; a unit without a label may have any tag.
Predictions are the sequence with the largest score (Viterbi) and the probability of each tag at
each unit (forward-backward). With a scheme (BIO, IOBES) both leave out the sequences that it does
not allow. The loss counts all sequences: a sentence that was cut may end within an entity.

Shapes: E examples, U units, L units of the longest example, C tags. All values are logarithms.
Source: Lafferty, McCallum and Pereira 2001, "Conditional Random Fields"; Rabiner 1989, "A Tutorial
on Hidden Markov Models", section III.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmtl.data.packed_batch import Units
from fastmtl.data.tags import Allowed
from fastmtl.model.precision import precise
from fastmtl.model.types.segments import padded

EXCLUDED = -1e30  # score of a tag other than the label; exp of it is 0


class Crf(nn.Module):
    """The transitions of a CRF: parameters `transitions` [C, C], `start` and `end` [C], all 0.

    allowed: the sequences that predictions may have.
    """

    def __init__(self, num_tags: int, allowed: Allowed) -> None:
        super().__init__()
        # "bias" in the names excludes the parameters from weight decay (see groups.py).
        self.transitions_bias = nn.Parameter(torch.zeros(num_tags, num_tags))
        self.start_bias = nn.Parameter(torch.zeros(num_tags))
        self.end_bias = nn.Parameter(torch.zeros(num_tags))
        for name in ("follows", "first", "last"):
            self.register_buffer(name, torch.from_numpy(getattr(allowed, name)), persistent=False)

    def forward(self, x: Tensor, units: Units, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each example, [E], or without labels the predictions.

        x: [U, C], float32 or wider. labels: int64 [U], -100 for a unit without one. Predictions:
        [U, 1 + C], the tag's id and the probabilities of all tags.
        """
        transitions, start, end = (
            precise(parameter).to(x.dtype) for parameter in (self.transitions_bias, self.start_bias, self.end_bias)
        )
        if labels is not None:
            tags = torch.arange(x.shape[1], device=x.device)
            other = (labels[:, None] >= 0) & (labels[:, None] != tags)
            pair = torch.stack([x, x.masked_fill(other, EXCLUDED)], dim=1)  # [U, 2, C]
            grid, inside = _grid(pair, units)
            alphas = _forward(grid, inside, transitions, start)
            every, labelled = (alphas[-1] + end).logsumexp(dim=-1).unbind(dim=1)
            return every - labelled
        transitions = transitions.masked_fill(~self.get_buffer("follows"), -torch.inf)
        start = start.masked_fill(~self.get_buffer("first"), -torch.inf)
        end = end.masked_fill(~self.get_buffer("last"), -torch.inf)
        grid, inside = _grid(x, units)
        p = torch.stack(_forward(grid, inside, transitions, start), dim=1)
        p = (p + _backward(grid, inside, transitions, end)).softmax(dim=2)
        best = _viterbi(grid, inside, transitions, start, end)
        return torch.cat([best[inside][:, None].to(p.dtype), p[inside]], dim=1)


def _grid(x: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """Return the units of each example in a row, [E, L, ...], and where there is one, bool [E, L].

    x: [U, ...]. L is at least 2: all ranks then compute gradients of all parameters, in the same
    order, as ZeRO demands.
    """
    grid = padded(x, units)
    if grid.shape[1] < 2:
        grid = torch.cat([grid, x.new_zeros(grid.shape[0], 2 - grid.shape[1], *x.shape[1:])], dim=1)
    counts = units.offsets.diff()
    return grid, torch.arange(grid.shape[1], device=x.device) < counts[:, None]


class _Advance(torch.autograd.Function):
    """Map alpha [..., C] and transitions [C, C] to log sum_i exp(alpha_i + transitions_ij).

    The result is [..., C]. The gradients are products with p_ij = exp(alpha_i + transitions_ij -
    result_j). Autograd's own would keep the C^2 sums of every unit until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, transitions: Tensor) -> Tensor:
        result = (alpha[..., :, None] + transitions).logsumexp(dim=-2)
        ctx.save_for_backward(alpha, transitions, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        alpha, transitions, result = ctx.saved_tensors
        p = (alpha[..., :, None] + transitions - result[..., None, :]).exp() * gradient[..., None, :]
        return p.sum(dim=-1), p.sum(dim=tuple(range(alpha.dim() - 1)))


def _forward(grid: Tensor, inside: Tensor, transitions: Tensor, start: Tensor) -> list[Tensor]:
    """Return L tensors [E, ..., C]: log of the sum over all tags of the units before each.

    grid: [E, L, ..., C]. Beyond an example's units the value of its last unit is repeated.
    """
    alphas = [start + grid[:, 0]]
    for x, here in zip(grid.unbind(dim=1)[1:], inside.unbind(dim=1)[1:], strict=True):
        new = _Advance.apply(alphas[-1], transitions) + x
        alphas.append(torch.where(here.reshape(-1, *[1] * (x.dim() - 1)), new, alphas[-1]))
    return alphas


def _backward(grid: Tensor, inside: Tensor, transitions: Tensor, end: Tensor) -> Tensor:
    """Return log of the sum over all tags of the units after each, [E, L, C]."""
    betas = [end.expand_as(grid[:, 0])]
    for x, here in zip(grid.unbind(dim=1)[:0:-1], inside.unbind(dim=1)[:0:-1], strict=True):
        new = (transitions + (x + betas[-1])[:, None, :]).logsumexp(dim=2)
        betas.append(torch.where(here[:, None], new, end))
    return torch.stack(betas[::-1], dim=1)


def _viterbi(grid: Tensor, inside: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the tags of the sequence with the largest score, int64 [E, L]."""
    best = start + grid[:, 0]
    last = [(best + end).argmax(dim=1)]  # the best last tag, were each unit the last
    before = []
    for x in grid.unbind(dim=1)[1:]:
        scores, came_from = (best[:, :, None] + transitions).max(dim=1)
        best = scores + x
        before.append(came_from)
        last.append((best + end).argmax(dim=1))
    tags = [last[-1]]
    for step in range(len(before) - 1, -1, -1):
        followed = before[step].gather(1, tags[-1][:, None]).squeeze(1)
        tags.append(torch.where(inside[:, step + 1], followed, last[step]))
    return torch.stack(tags[::-1], dim=1)
