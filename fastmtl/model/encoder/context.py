"""The state that all layers of one forward pass share."""

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

# Places: indices of dropout seeds. Place 0 is that of the embeddings; each layer has four more.
EMBEDDINGS = 0
ATTENTION, ATTENTION_OUTPUT, OUTPUT, ADAPTER = range(4)
_IN_LAYER = 4


def place(layer: int, which: int) -> int:
    """Return the place `which` (ATTENTION, ...) of a layer."""
    return 1 + _IN_LAYER * layer + which


@dataclass(frozen=True, eq=False)
class SegmentContext:
    """Input of a linear layer besides x.

    segments: the rows of each task.
    task_grads: the sink of task gradients; see layers.py.
    """

    segments: Segments
    task_grads: Sink | None


@dataclass(frozen=True, eq=False)
class ForwardContext(SegmentContext):
    """State of one forward pass over token rows.

    segments: the token rows of each task.
    seeds: int64 [places], None outside training.
    plan: the attention plan, made once per batch; None where the kernels need none.
    recomputed: takes results that backward can compute again cheaply.
    batch: None where a recording runs, which serves all batches of a size.
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
        """Build the context of a batch and draw its seeds from torch's generator of the device.

        Masks depend on the generator's state before the forward alone, even where backward
        computes results again. plan: False leaves the plan to `planned`.
        """
        seeds = None
        if training:
            places = place(num_layers, 0)
            seeds = torch.randint(1 << 62, (places,), device=batch.input_ids.device)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        context = cls(segments, task_grads, batch.cu_seqlens, seeds, None, recomputed, batch)
        return context.planned() if plan else context

    def planned(self) -> ForwardContext:
        """Return this context with the plan that attention needs on the batch's device."""
        assert self.batch is not None
        plan = self.batch.attention_plan()
        return self if plan is None else replace(self, plan=plan)

    def of_task(self, task: int) -> ForwardContext:
        """Return the context for the rows of one task and modules that belong to this task alone.

        It has no sink: surgery does not merge parameters of one task.
        """
        assert self.batch is not None
        batch = self.batch.task(task)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        return ForwardContext(segments, None, batch.cu_seqlens, self.seeds, None, self.recomputed, batch).planned()

    def seed(self, at: int) -> Tensor | None:
        """Return the seed of a place, int64 [1], or None outside training."""
        return None if self._seeds is None else self._seeds[at]

    @cached_property
    def _seeds(self) -> tuple[Tensor, ...] | None:
        return None if self.seeds is None else self.seeds.split([1] * len(self.seeds))

    @property
    def armed(self) -> Sink | None:
        """The sink while it accepts writes, else None."""
        return None if self.task_grads is None or not self.task_grads.active else self.task_grads

    def attend(self, qkv: Tensor, num_heads: int, dropout: float, at: int) -> Tensor:
        """Attend within each sequence: qkv [N, 3, heads * size] -> [N, heads * size].

        dropout: of the probabilities. at: the place of its seed.
        """
        return varlen_attention(
            qkv.unflatten(2, (num_heads, -1)),
            self.cu_seqlens,
            dropout_p=dropout,
            seed=self.seed(at),
            plan=self.plan,
        ).flatten(1)
