"""What every layer of one forward pass shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.remade import Remade
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.task_gradients import TaskGradients

# Where masks are drawn, each by a seed of its own: place 0 is the embeddings, then these in each layer.
EMBEDDINGS = 0
ATTENTION, ATTENTION_OUTPUT, OUTPUT, ADAPTER = range(4)
_IN_LAYER = 4


def place(layer: int, which: int) -> int:
    """The place `which` (ATTENTION, ...) of a layer."""
    return 1 + _IN_LAYER * layer + which


@dataclass(frozen=True, eq=False)
class SegmentContext:
    """What a linear layer needs. segments: the tasks' rows; task_grads: see layers.py."""

    segments: Segments
    task_grads: TaskGradients | None


@dataclass(frozen=True, eq=False)
class ForwardContext(SegmentContext):
    """segments: the tasks' token rows. seeds: int64 [places], None outside training. plan: made once per batch for the
    attention kernels, None where they need none. remade: takes what backward can make again cheaply. batch: None where
    what is run is recorded for all of a size.
    """

    cu_seqlens: Tensor
    seeds: Tensor | None
    plan: AttentionPlan | None
    remade: Remade | None = None
    batch: PackedBatch | None = None

    @classmethod
    def build(
        cls,
        batch: PackedBatch,
        num_layers: int,
        *,
        training: bool,
        task_grads: TaskGradients | None = None,
        remade: Remade | None = None,
        plan: bool = True,
    ) -> ForwardContext:
        """The seeds are drawn here, from torch's generator of the device: masks follow from its state before the
        forward, whatever backward computes again. plan: False leaves it to `planned`.
        """
        seeds = None
        if training:
            places = place(num_layers, 0)
            seeds = torch.randint(1 << 62, (places,), device=batch.input_ids.device)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        context = cls(segments, task_grads, batch.cu_seqlens, seeds, None, remade, batch)
        return context.planned() if plan else context

    def planned(self) -> ForwardContext:
        """With the plan that the attention kernels of the batch's device need."""
        assert self.batch is not None
        plan = self.batch.attention_plan()
        return self if plan is None else replace(self, plan=plan)

    def of_task(self, task: int) -> ForwardContext:
        """For the rows of one task alone, and parameters that are its own: they are none of the sink's."""
        assert self.batch is not None
        batch = self.batch.task(task)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        return ForwardContext(segments, None, batch.cu_seqlens, self.seeds, None, self.remade, batch).planned()

    def seed(self, at: int) -> Tensor | None:
        """int64 [1], of a place; None outside training."""
        return None if self._seeds is None else self._seeds[at]

    @cached_property
    def _seeds(self) -> tuple[Tensor, ...] | None:
        return None if self.seeds is None else self.seeds.split([1] * len(self.seeds))

    @property
    def armed(self) -> TaskGradients | None:
        """The sink, where it takes writes."""
        return None if self.task_grads is None or self.task_grads.mode is None else self.task_grads

    def attend(self, qkv: Tensor, num_heads: int, dropout: float, at: int) -> Tensor:
        """qkv [N, 3, num_heads * head size] -> [N, num_heads * head size], with dropout of the probabilities.

        at: the place of their seed.
        """
        return varlen_attention(
            qkv.unflatten(2, (num_heads, -1)),
            self.cu_seqlens,
            dropout_p=dropout,
            seed=self.seed(at),
            plan=self.plan,
        ).flatten(1)
