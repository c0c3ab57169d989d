"""One batch with the sequences of all tasks one after the other, without padding.

Shapes: N tokens, B sequences, T tasks of the recipe, E_t examples of task t in this batch.
Sequences are sorted by task, so the tokens of a task are contiguous, and so are its sequences. A
task that is absent from the batch has none. In a bi-encoded pair (`pairs: bi`) each text is a
sequence of its own; `pairs` gives the two sequences of each example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmtl_kernels.upload import upload
from fastmtl_kernels.varlen_attention.plan import AttentionPlan, needs_plan


@dataclass(frozen=True, eq=False)
class Units:
    """The units of the E examples of one task in a batch, U in all (see UnitTable).

    example: int64 [U], the example of each unit, from 0 and ascending.
    offsets: int64 [E + 1]; example e has the units offsets[e] to offsets[e + 1] - 1.
    rows: int64 [U], the row of each unit among the N tokens; None if the units are sequences.
    host: the offsets as Python integers.
    """

    example: Tensor
    offsets: Tensor
    rows: Tensor | None
    host: tuple[int, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Units:
        """Return the units with each tensor replaced by function(tensor)."""
        rows = None if self.rows is None else function(self.rows)
        return Units(function(self.example), function(self.offsets), rows, self.host)

    def none(self) -> Units:
        """Return the units of no example."""
        return Units(self.example[:0], self.offsets[:1], None if self.rows is None else self.rows[:0], (0,))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One batch: its tensors, and the offsets as Python integers.

    input_ids, position_ids, token_type_ids: int64 [N]; positions start at 0 in every sequence.
    cu_seqlens: int32 [B + 1], sequence b is rows cu_seqlens[b]:cu_seqlens[b + 1].
    seq_offsets, token_offsets: int32 [T + 1]; sequences and tokens of task t are
    offsets[t]:offsets[t + 1].
    labels: T tensors with the labels of the examples, or of their units, in the dtypes of
    fastmtl.data.rows.Rows; None for a task without labels.
    example_ids: T tensors int64 [E_t], the positions of the examples in their data set.
    pairs: T entries; for bi-encoded pairs int64 [E_t, 2], the indices of both texts among the B
    sequences, or [U_t, 2] for units that are compared with a query; else None.
    group_counts: T integers, the loss terms of each task over all ranks and micro-batches of this
    optimiser step; None outside training. A loss term is an example, or of type tokens a word with
    a label.
    host: the offsets as Python integers, so that no operation waits for the device.
    plan: the AttentionPlan if `prepared` made one, else None.
    cached: data that the loss of a task needs about the whole step, added by
    fastmtl.model.losses.cached_pairs; else None.
    units: T entries, a Units or None for a task whose head gives one output per example; () stands
    for None each.
    terms: T integers, the loss terms of each task in this batch; None: the numbers of examples.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    seq_offsets: Tensor
    token_offsets: Tensor
    labels: tuple[Tensor | None, ...]
    example_ids: tuple[Tensor, ...]
    pairs: tuple[Tensor | None, ...]
    host: HostOffsets
    group_counts: tuple[int, ...] | None = None
    plan: AttentionPlan | None = None
    cached: Any = None
    units: tuple[Units | None, ...] = ()
    terms: tuple[int, ...] | None = None

    @property
    def num_tasks(self) -> int:
        return len(self.example_ids)

    @property
    def num_tokens(self) -> int:
        return self.host.token_offsets[-1]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of examples of each task in this batch."""
        return tuple(int(ids.shape[0]) for ids in self.example_ids)

    @property
    def loss_terms(self) -> tuple[int, ...]:
        """The number of loss terms of each task in this batch."""
        return self.counts if self.terms is None else self.terms

    def units_of(self, index: int) -> Units | None:
        """Return the units of the task `index`."""
        return self.units[index] if self.units else None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on `device`, after calling `prepared`.

        The host does not wait for the copies.
        """
        return self.prepared(torch.device(device)).map(lambda tensor: upload(tensor, device))

    def prepared(self, device: torch.device) -> PackedBatch:
        """Return the batch with an AttentionPlan, or unchanged if `device` needs no plan.

        Also unchanged if the batch is no longer on the CPU: a plan is made from CPU data.
        """
        if self.plan is not None or self.input_ids.device.type != "cpu" or not needs_plan(device):
            return self
        plan = AttentionPlan.make(self.host.cu_seqlens, self.num_tokens)
        return dataclasses.replace(self, plan=plan, host=dataclasses.replace(self.host, plan=plan))

    def attention_plan(self) -> AttentionPlan | None:
        """Return the AttentionPlan on the batch's device, None if its kernels need none.

        This call makes the plan if `prepared` has made none.
        """
        device = self.input_ids.device
        if self.plan is not None or not needs_plan(device):
            return self.plan
        return AttentionPlan.make(self.host.cu_seqlens, self.num_tokens, device)

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Return the batch with each tensor replaced by function(tensor)."""

        def mapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, AttentionPlan | Units):
                return value.map(function)
            if isinstance(value, tuple):
                return tuple(mapped(item) for item in value)
            return value

        return dataclasses.replace(self, **{f.name: mapped(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def of_task(self, index: int) -> PackedBatch:
        """Return the batch with all its sequences given to the task `index`.

        Exactly one task has sequences in this batch.
        """
        (own,) = (t for t, count in enumerate(self.counts) if count)

        def moved(values: tuple[Any, ...], empty: Any = None) -> tuple[Any, ...]:
            return tuple(values[own] if t == index else empty for t in range(len(values)))

        def offsets(total: int) -> tuple[int, ...]:
            return (0,) * (index + 1) + (total,) * (self.num_tasks - index)

        host = dataclasses.replace(
            self.host,
            seq_offsets=offsets(self.host.seq_offsets[-1]),
            token_offsets=offsets(self.host.token_offsets[-1]),
        )
        device = self.seq_offsets.device
        return dataclasses.replace(
            self,
            seq_offsets=upload(torch.tensor(host.seq_offsets, dtype=torch.int32), device),
            token_offsets=upload(torch.tensor(host.token_offsets, dtype=torch.int32), device),
            labels=moved(self.labels),
            example_ids=moved(self.example_ids, self.example_ids[own][:0]),
            pairs=moved(self.pairs),
            units=moved(self.units),
            terms=None if self.terms is None else moved(self.terms, 0),
            group_counts=None,
            host=host,
        )

    def task(self, index: int) -> PackedBatch:
        """Return the batch with the sequences of task `index` only; the other tasks are empty."""
        token_start, token_stop = self.host.token_offsets[index : index + 2]
        seq_start, seq_stop = self.host.seq_offsets[index : index + 2]
        rows = slice(token_start, token_stop)
        num_sequences = seq_stop - seq_start

        def offsets(total: int) -> list[int]:
            return [0] * (index + 1) + [total] * (self.num_tasks - index)

        host = HostOffsets(
            cu_seqlens=tuple(value - token_start for value in self.host.cu_seqlens[seq_start : seq_stop + 1]),
            seq_offsets=tuple(offsets(num_sequences)),
            token_offsets=tuple(offsets(token_stop - token_start)),
        )
        pair = self.pairs[index]

        def only(values: tuple[Tensor | None, ...], keep: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(
                keep if t == index else (None if value is None else value[:0]) for t, value in enumerate(values)
            )

        units = tuple(None if one is None else one.none() for one in self.units)
        own = self.units_of(index)
        if own is not None:
            own = own if own.rows is None else dataclasses.replace(own, rows=own.rows - token_start)
            units = (*units[:index], own, *units[index + 1 :])

        def number(numbers: tuple[int, ...] | None) -> tuple[int, ...] | None:
            return None if numbers is None else tuple(n if t == index else 0 for t, n in enumerate(numbers))

        return PackedBatch(
            input_ids=self.input_ids[rows],
            position_ids=self.position_ids[rows],
            token_type_ids=self.token_type_ids[rows],
            cu_seqlens=self.cu_seqlens[seq_start : seq_stop + 1] - token_start,
            seq_offsets=upload(torch.tensor(host.seq_offsets, dtype=torch.int32), self.seq_offsets.device),
            token_offsets=upload(torch.tensor(host.token_offsets, dtype=torch.int32), self.token_offsets.device),
            labels=only(self.labels, self.labels[index]),
            example_ids=only(self.example_ids, self.example_ids[index]),  # type: ignore[arg-type]
            pairs=only(self.pairs, None if pair is None else pair - seq_start),
            host=host,
            group_counts=number(self.group_counts),
            units=units,
            terms=number(self.terms),
        )


@dataclass(frozen=True)
class HostOffsets:
    """The offsets of a `PackedBatch` as Python integers. plan: its AttentionPlan on the CPU."""

    cu_seqlens: tuple[int, ...]
    seq_offsets: tuple[int, ...]
    token_offsets: tuple[int, ...]
    plan: AttentionPlan | None = field(default=None, compare=False)

    def plan_of(self, num_rows: int) -> AttentionPlan:
        """Return the AttentionPlan on the CPU for buffers that are padded to `num_rows` rows.

        num_rows: at least the number of tokens.
        """
        if self.plan is not None:
            return self.plan.with_rows(num_rows)
        return AttentionPlan.make(self.cu_seqlens, num_rows)
