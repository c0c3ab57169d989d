"""Task type ranking: losses of the scores, or of the vectors, of a query's candidates.

Group e is a query q with candidates c_i, grades y_i and scores s_i, the outputs of the head. The
losses listwise and pairwise multiply the scores by ranking.scale.

    listwise  - sum_i softmax(y)_i log softmax(s)_i
    pairwise  mean over the pairs with y_i > y_j of log(1 + exp(s_j - s_i))
    triplet   mean over the pairs with y_i > y_j of max(0, ranking.margin - s_i + s_j)
    mnr       mean over the i with y_i > 0 of - log(exp(S_i) / (exp(S_i) + sum_j exp(S_j)))
              with S = mnr.scale cos(q, c). j runs over the candidates of all groups in the batch of
              all ranks, without those of q with a grade above 0.

A group without such a pair, or without a grade above 0 in mnr, has the loss 0.
Sources: listwise (ListNet): Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise
Approach", section 4. pairwise (RankNet): Burges et al. 2005, "Learning to Rank using Gradient
Descent", equation 3. triplet: Schroff et al. 2015, "FaceNet", equation 2, with scores in place of
negative distances. mnr: Henderson et al. 2017, equation 4, with candidates as further negatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.model.examples import Examples
from fastmtl.model.losses.rank_rows import gather_rows
from fastmtl.model.precision import precise
from fastmtl.model.types.segments import padded, segment_divergence, segment_log_softmax, segment_sum
from fastmtl.model.types.spec import UnitLoss, UnitType
from fastmtl.surgery.ranks.collectives import world_size


def scale_of(task: TaskConfig) -> float:
    return task.ranking.scale_for(task.head.name)


def listwise(task: TaskConfig) -> UnitLoss:
    scale = scale_of(task)

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        units, scores = _scores(found)
        shares = segment_log_softmax(labels.to(scores.dtype), units).exp()
        return -segment_sum(shares * segment_log_softmax(scale * scores, units), units)

    return loss


def pairwise(task: TaskConfig) -> UnitLoss:
    scale = scale_of(task)
    return _mean_over_pairs(lambda difference: functional.softplus(-scale * difference))


def triplet(task: TaskConfig) -> UnitLoss:
    margin = task.ranking.margin
    return _mean_over_pairs(lambda difference: (margin - difference).clamp(min=0))


def _mean_over_pairs(function: Callable[[Tensor], Tensor]) -> UnitLoss:
    """Return the loss mean of function(s_i - s_j) over the pairs of a group with y_i > y_j."""

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        units, scores = _scores(found)
        s, y = padded(scores, units), padded(labels.to(scores.dtype), units, fill=torch.nan)
        better = y[:, :, None] > y[:, None, :]  # False for places without a candidate
        terms = function(s[:, :, None] - s[:, None, :]).where(better, 0.0)
        return terms.sum((1, 2)) / better.sum((1, 2)).clamp(min=1)

    return loss


def mnr(task: TaskConfig) -> UnitLoss:
    scale = task.mnr.scale

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        assert found.units is not None and found.v is not None
        units = found.units
        queries, candidates = (functional.normalize(precise(x), dim=1) for x in (found.u, found.v))
        positive = labels > 0
        own_rank = dist.get_rank() if world_size() > 1 else 0
        # The rank and the group of each positive candidate, -1 for the others. Whole numbers are
        # exact in float32.
        marks = torch.stack([torch.full_like(units.example, own_rank), units.example], dim=1)
        marks = marks.where(positive[:, None], -1).to(candidates.dtype)
        rows = gather_rows(torch.cat([candidates, marks], dim=1))
        others, rank, group = rows[:, :-2], rows[:, -2], rows[:, -1]
        examples = torch.arange(len(units.host) - 1, device=rank.device)
        skipped = (rank == own_rank) & (group == examples[:, None])
        first = queries[units.offsets[:-1]]
        negatives = (scale * first @ others.T).masked_fill(skipped, -torch.inf).logsumexp(dim=1)
        scores = scale * (queries * candidates).sum(1)
        terms = functional.softplus(negatives[units.example] - scores).where(positive, 0.0)
        return segment_sum(terms, units) / segment_sum(positive.to(terms.dtype), units).clamp(min=1)

    return loss


def _scores(found: Examples) -> tuple[Units, Tensor]:
    assert found.units is not None
    return found.units, found.outputs.squeeze(1)


def predictions(task: TaskConfig, found: Examples, head: nn.Module) -> Tensor:
    """Return the score of each candidate, [U]."""
    return found.outputs.squeeze(1)


def divergence(task: TaskConfig, p: Tensor, q: Tensor, units: Units) -> Tensor:
    """Return KL(p, q) + KL(q, p) of the softmax over each group's scaled scores, [E]."""
    scale = scale_of(task)
    return segment_divergence(scale * p.squeeze(1), scale * q.squeeze(1), units)


RANKING = UnitType(
    lambda task: 1,
    {"listwise": listwise, "pairwise": pairwise, "triplet": triplet, "mnr": mnr},
    predictions,
    divergence,
    of_vectors=("mnr",),
)
