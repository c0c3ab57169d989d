"""What every layer of one forward pass shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.attention import AttentionPlan
from fastmtl.surgery.segments import Segments

if TYPE_CHECKING:
    from fastmtl.surgery.task_gradients import TaskGradients


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """plan: the attention groups, made once per batch; segments: the tasks' token rows; task_grads: see layers.py."""

    batch: PackedBatch
    plan: AttentionPlan
    segments: Segments
    task_grads: TaskGradients | None = None

    @classmethod
    def build(cls, batch: PackedBatch, dtype: torch.dtype, task_grads: TaskGradients | None = None) -> ForwardContext:
        """dtype: that of the hidden states."""
        plan = AttentionPlan.build(batch.host.cu_seqlens, batch.input_ids.device, dtype)
        return cls(batch, plan, Segments(batch.token_offsets, batch.host.token_offsets), task_grads)
