"""Data of one forward pass that all layers read: row ranges, dropout seeds, the sink."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.recompute import RecomputedResults
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink

# A place is the index of a dropout's seed in ForwardContext.seeds. The embeddings have place 0.
# Each layer has four more, one for each of its dropouts.
EMBEDDINGS = 0
ATTENTION, ATTENTION_OUTPUT, OUTPUT, ADAPTER = range(4)
_IN_LAYER = 4


def place(layer: int, which: int) -> int:
    """Return the place of a dropout of a layer.

    which: the dropout; ATTENTION, ATTENTION_OUTPUT, OUTPUT or ADAPTER.
    """
    return 1 + _IN_LAYER * layer + which


@dataclass(frozen=True, eq=False)
class SegmentContext:
    """Data that a linear layer needs besides its input x to compute gradients per task.

    segments: the rows of x that belong to each task.
    task_grads: sink for the gradients per task (see layers.py); None for ordinary gradients.
    """

    segments: Segments
    task_grads: Sink | None


@dataclass(frozen=True, eq=False)
class ForwardContext(SegmentContext):
    """Data of one forward pass of the encoder; a row is a token.

    segments: the tokens of each task. cu_seqlens: int32 [B + 1], the bounds of the sequences.
    seeds: dropout seeds, int64 [places], indexed by `place`; None outside training.
    plan: attention plan of the batch; None if the device's attention needs no plan.
    recomputed: results to compute again in backward (recompute.py); None to keep all results.
    batch: the batch; None in a recording, which serves many batches.
    """

    cu_seqlens: Tensor
    seeds: Tensor | None
    plan: AttentionPlan | None
    recomputed: RecomputedResults | None = None
    batch: PackedBatch | None = None

    @classmethod
    def build(
        cls,
        batch: PackedBatch,
        num_layers: int,
        *,
        training: bool,
        task_grads: Sink | None = None,
        recomputed: RecomputedResults | None = None,
        plan: bool = True,
    ) -> ForwardContext:
        """Build the context of a batch. In training, draw its seeds from the device's generator.

        All seeds are drawn here at once. The dropout masks therefore depend only on the generator's
        state before the forward, and a result computed again in backward has the same mask.
        num_layers: layers that need places for seeds, those of a top included.
        plan: False to make no attention plan yet; `planned` adds it.
        """
        seeds = None
        if training:
            places = place(num_layers, 0)
            seeds = torch.randint(1 << 62, (places,), device=batch.input_ids.device)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        context = cls(segments, task_grads, batch.cu_seqlens, seeds, None, recomputed, batch)
        return context.planned() if plan else context

    def planned(self) -> ForwardContext:
        """Return this context with the attention plan of its batch.

        The plan is None if attention on the batch\'s device needs none.
        """
        assert self.batch is not None
        plan = self.batch.attention_plan()
        return self if plan is None else replace(self, plan=plan)

    def of_task(self, task: int) -> ForwardContext:
        """Return the context of one task's tokens, for modules that only this task uses.

        It has no sink: only shared parameters need a gradient per task.
        """
        assert self.batch is not None
        batch = self.batch.task(task)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        return ForwardContext(segments, None, batch.cu_seqlens, self.seeds, None, self.recomputed, batch).planned()

    def seed(self, at: int) -> Tensor | None:
        """Return the dropout seed at a place, int64 [1] on the device; None outside training."""
        return None if self._seeds is None else self._seeds[at]

    @cached_property
    def _seeds(self) -> tuple[Tensor, ...] | None:
        return None if self.seeds is None else self.seeds.split([1] * len(self.seeds))

    @property
    def armed(self) -> Sink | None:
        """The sink, if it is armed, so that it accepts gradients; else None."""
        return None if self.task_grads is None or not self.task_grads.active else self.task_grads

    def attend(self, qkv: Tensor, num_heads: int, dropout: float, at: int) -> Tensor:
        """Return multi-head attention within each sequence, [N, heads * size].

        qkv [N, 3, heads * size]: queries, keys and values.
        dropout: dropout rate of the attention probabilities. at: the place of its seed.
        """
        return varlen_attention(
            qkv.unflatten(2, (num_heads, -1)),
            self.cu_seqlens,
            dropout_p=dropout,
            seed=self.seed(at),
            plan=self.plan,
        ).flatten(1)
