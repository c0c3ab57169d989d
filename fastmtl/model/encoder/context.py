"""Data of one forward pass that all layers read: row ranges, dropout seeds, the sink."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.recompute import RecomputedResults
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink

# The dropouts with a seed of their own: one after the embeddings, four in each layer.
EMBEDDINGS = 0
ATTENTION, ATTENTION_OUTPUT, OUTPUT, ADAPTER = range(4)
_IN_LAYER = 4


def num_seeds(num_layers: int) -> int:
    """Return the number of dropout seeds of a forward: of the embeddings and of all layers."""
    return 1 + _IN_LAYER * num_layers


class Seeds:
    """Dropout seeds of a forward: tensor, int64 [num_seeds(layers)], and its parts [1]."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._parts = tensor.split([1] * len(tensor))

    def at(self, layer: int | None, which: int) -> Tensor:
        """Return the seed, int64 [1], of a dropout of a layer; EMBEDDINGS belongs to no layer."""
        return self._parts[which if layer is None else 1 + _IN_LAYER * layer + which]


class LinearAdapter(Protocol):
    """LoRA: terms that are added to the outputs of linear layers.

    training: draws dropout. by_task: each task has its own terms.
    """

    training: bool
    by_task: bool

    def term(self, linear: nn.Module, x: Tensor, context: ForwardContext) -> Tensor | None:
        """Return the term [N, out] for a layer with input x [N, in], or None for no term."""


@dataclass(frozen=True, eq=False)
class SegmentContext:
    """Data that a linear layer needs besides its input x to compute gradients per task.

    segments: the rows of x that belong to each task.
    task_grads: sink for the gradients per task (see layers.py); None for ordinary gradients.
    """

    segments: Segments
    task_grads: Sink | None

    def term(self, linear: nn.Module, x: Tensor) -> Tensor | None:
        """Return the term [N, out] that a LoRA adds to a layer's output, or None for no term.

        linear: the layer. x: its input [N, in].
        """
        return None


@dataclass(frozen=True, eq=False)
class ForwardContext(SegmentContext):
    """Data of one forward pass of the encoder; a row is a token.

    segments: the tokens of each task. cu_seqlens: int32 [B + 1], the bounds of the sequences.
    seeds: dropout seeds; None outside training.
    plan: attention plan of the batch; None if the device's attention needs no plan.
    recomputed: results to compute again in backward (recompute.py); None to keep all results.
    batch: the batch; None in a recording, which serves many batches.
    layer: number of the layer that runs, from 0; None before the layers.
    common: data that all layers of this family of encoders read (`PackedEncoder.begin`), or None.
    lora: the LoRA of the linear layers, or None.
    """

    cu_seqlens: Tensor
    seeds: Seeds | None
    plan: AttentionPlan | None
    recomputed: RecomputedResults | None = None
    batch: PackedBatch | None = None
    layer: int | None = None
    common: Any = None
    lora: LinearAdapter | None = None

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
        lora: LinearAdapter | None = None,
    ) -> ForwardContext:
        """Build the context of a batch. In training, draw its seeds from the device's generator.

        All seeds are drawn here at once. The dropout masks therefore depend only on the generator's
        state before the forward, and a result computed again in backward has the same mask.
        num_layers: layers that need seeds, those of a top included.
        plan: False to make no attention plan yet; `planned` adds it.
        """
        seeds = None
        if training:
            seeds = Seeds(torch.randint(1 << 62, (num_seeds(num_layers),), device=batch.input_ids.device))
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        context = cls(segments, task_grads, batch.cu_seqlens, seeds, None, recomputed, batch, lora=lora)
        return context.planned() if plan else context

    def planned(self) -> ForwardContext:
        """Return this context with the attention plan of its batch.

        The plan is None if attention on the batch\'s device needs none.
        """
        assert self.batch is not None
        plan = self.batch.attention_plan()
        return self if plan is None else replace(self, plan=plan)

    def at(self, layer: int) -> ForwardContext:
        """Return the context of the layer with this number, from 0."""
        return replace(self, layer=layer)

    def of_task(self, task: int) -> ForwardContext:
        """Return the context of one task's tokens, for modules that only this task uses.

        It has no sink, since only shared parameters need a gradient per task, and no LoRA.
        """
        assert self.batch is not None
        batch = self.batch.task(task)
        segments = Segments(batch.token_offsets, batch.host.token_offsets)
        task_context = ForwardContext(segments, None, batch.cu_seqlens, self.seeds, None, self.recomputed, batch)
        return task_context.planned()

    def term(self, linear: nn.Module, x: Tensor) -> Tensor | None:
        return None if self.lora is None else self.lora.term(linear, x, self)

    def seed(self, which: int) -> Tensor | None:
        """Return the seed of a dropout of the layer that runs, int64 [1] on the device.

        which: ATTENTION, ATTENTION_OUTPUT, OUTPUT or ADAPTER; EMBEDDINGS before the layers.
        None outside training.
        """
        return None if self.seeds is None else self.seeds.at(self.layer, which)

    @property
    def armed(self) -> Sink | None:
        """The sink, if it is armed, so that it accepts gradients; else None."""
        return None if self.task_grads is None or not self.task_grads.active else self.task_grads

    @property
    def by_task(self) -> bool:
        """True if layers compute something else for each task: T gradients, or their own LoRA."""
        return self.armed is not None or (self.lora is not None and self.lora.by_task)

    def attend(
        self,
        qkv: Tensor,
        num_heads: int,
        dropout: float,
        *,
        window: int | None = None,
        rotary: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return multi-head attention within each sequence, [N, heads * size].

        qkv [N, 3, heads * size]: queries, keys and values.
        dropout: dropout rate of the attention probabilities.
        window, rotary: as in `varlen_attention`.
        bias: as there, [G, heads, 2 R - 1], with G = 1 or, with a bias for each task, G = T.
        """
        of_tasks = None
        if bias is not None and len(bias) > 1:
            assert self.batch is not None
            of_tasks = self.batch.seq_offsets
        return varlen_attention(
            qkv.unflatten(2, (num_heads, -1)),
            self.cu_seqlens,
            dropout_p=dropout,
            seed=self.seed(ATTENTION),
            plan=self.plan,
            window=window,
            rotary=rotary,
            bias=bias,
            bias_offsets=of_tasks,
        ).flatten(1)
