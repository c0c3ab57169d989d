"""CUDA graph of gradient surgery: one launch for Gramian, task weights and merged gradient.

The recording reads the Jacobian J at its fixed address. It also reads buffers, filled before each
replay, with the gradient rows of embedding tables and a few numbers. It writes the Gramian G, the
weights and the merged gradient into buffers. The host then waits for the device once per step, at
the end; the price is that a step with non-finite gradients is merged too and then skipped.
Several ranks whose J is summed over the ranks compute G by collectives. Then G is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from fastmtl.cuda_graphs.buffers.tables import StaticRows, capacity_of, spread, sums_by_id
from fastmtl.cuda_graphs.recorder import Recorder, Recordings
from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.jacobian.tables import Tables
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.targets.protocol import Target
from fastmtl_kernels import combine, gramian
from fastmtl_kernels.upload import upload_into


def record_merging(
    sink: Sink, method: Method, target: Target, storage: str, *, recorder: Recorder | None = None
) -> tuple[RecordedStep | None, Sequence[str]]:
    """Return the recorded merging of a sink, None if it cannot be recorded, and the reasons.

    storage: the way in which the task gradients are stored, "stacked" for J.
    recorder: used instead of CUDA graphs, for instance for tests on a CPU.
    The list of reasons why something is not recorded may grow during the run.
    """
    recordings = Recordings(recorder)
    reason = unsupported_reason(sink, method, target, storage)
    if not reason and recorder is None and target.device.type != "cuda":
        reason = f"CUDA graphs need an NVIDIA GPU, the model is on {target.device.type}"
    if reason or not isinstance(sink, StackSink):
        recordings.warn_once(f"gradient surgery falls back to eager execution: {reason}")
        return None, recordings.warned
    narrow = not target.wants_float32()
    return RecordedStep(sink, method, sink.num_tasks, target.device, recordings, narrow=narrow), recordings.warned


def unsupported_reason(sink: Sink, method: Method, target: Target, storage: str) -> str:
    """Return why these settings rule out a recording whatever the device, "" if they do not."""
    if storage != "stacked" or not isinstance(sink, StackSink):
        return "storage: kept, storage: replay and scope: tensor store no J"
    if sink.sketches:
        return "sketches change with every step"
    if not method.by_tensor:
        return "the method solves on the host"
    return "SurgeryAdamW merges task gradients itself" if target.merges else ""


class RecordedStep:
    """The merging of a `StackSink`'s task gradients by recordings, made when first needed.

    There is one recording for each combination of the tables' buffer rows (`capacity_of`).
    method: computes the weights from G; it has to solve on the device.
    narrow: True for a merged gradient in the parameters' 16-bit dtype, if they have one in common;
    False for float32.
    Attributes, valid after `run`, gram: G, float32 [T, T]. weights: float32 [T].
    """

    def __init__(
        self,
        sink: StackSink,
        method: Method,
        num_tasks: int,
        device: torch.device,
        recordings: Recordings,
        *,
        narrow: bool = False,
    ) -> None:
        self._narrow = narrow
        self._sink, self._method, self._num_tasks, self._device = sink, method, num_tasks, device
        self._recordings = recordings
        self.gram = torch.zeros(num_tasks, num_tasks, device=device)
        self.weights = torch.zeros(num_tasks, device=device)
        self._buffers: _Buffers | None = None
        self._kept: dict[tuple[int, ...], Callable[[], None]] = {}

    def run(self, order: Tensor, scale: float, factor: float) -> None:
        """Compute G, the weights and the merged gradient of a step.

        order: the method's random order, int64 [T, T] on the CPU (`Method.weights`).
        scale: factor of the losses whose gradients are in J; G is that of the unscaled losses.
        factor: the merged gradient is multiplied by it.
        """
        jacobian, tables = self._sink.stacked()
        if self._buffers is None:
            self._recordings.begin(self._device)
            dtype = jacobian.narrow if self._narrow else torch.float32
            copied = any(parameter.dtype == dtype for parameter in self._sink.dense)
            self._buffers = _Buffers(jacobian, tables, self._num_tasks, self._device, dtype, copied=copied)
        with_gramian = not self._sink.scatters
        jacobian.complete()
        if not with_gramian:
            self.gram.copy_(self._sink.gramian()).div_(scale**2)
        buffers = self._buffers
        if buffers.fill(scale, factor, order):
            self._kept.clear()
            self._recordings.begin(self._device)
        key = buffers.key
        if key not in self._kept:
            self._kept[key] = self._record(partial(self._merge, buffers, key, with_gramian=with_gramian))
        self._kept[key]()

    def gradients(self) -> Merged:
        """Return the merged gradients of the last `run` as {id(parameter): gradient}.

        The gradients are views of buffers that the next `run` overwrites. Those that have the dtype
        of their parameter can become its `.grad`, so they are copies.
        """
        assert self._buffers is not None
        return self._buffers.gradients()

    def scale(self, factor: float) -> None:
        """Multiply the merged gradient in place. A factor NaN makes all of it NaN."""
        assert self._buffers is not None
        for tensor in (self._buffers.merged, *self._buffers.of_tables):
            tensor.mul_(factor)

    def tensors(self) -> list[Tensor]:
        """Return the buffers, to count their memory; J is not among them."""
        return [] if self._buffers is None else self._buffers.tensors()

    def _record(self, function: Callable[[], None]) -> Callable[[], None]:
        state = self._method.state_dict()

        def warm_up() -> None:
            try:
                function()
            finally:  # the warm-up is not a step
                self._method.load_state_dict(state)

        return self._recordings.record({None: function}, [warm_up])[None]

    @torch.no_grad()
    def _merge(self, buffers: _Buffers, key: tuple[int, ...], *, with_gramian: bool) -> None:
        """Compute G (if `with_gramian`), the weights and the merged gradient in the buffers.

        This function is recorded, so it must not wait for the device or read numbers on the host.
        key: buffer rows in use, per table.
        """
        scale, factor, order, bounds = buffers.numbers()
        tables = []
        for (table, rows), capacity, its_bounds in zip(buffers.rows, key, bounds, strict=True):
            tables.append(sums_by_id(rows.ids[:capacity], rows.rows[:capacity], its_bounds, table.shape[0]))
        if with_gramian:
            gram = gramian(buffers.jacobian.buffer)
            for sums, _ in tables:
                gram += gramian(sums.flatten(1))
            self.gram.copy_(gram / scale.square())
        self.weights.copy_(self._method.weights(self.gram, order))
        scaled = self.weights * factor
        buffers.jacobian.merge(scaled, buffers.merged.dtype, out=buffers.merged)
        for (sums, unique), out in zip(tables, buffers.of_tables, strict=True):
            merged = combine(sums.flatten(1), scaled)
            assert isinstance(merged, Tensor)
            spread(merged.view(len(unique), -1), unique, out)


class _Buffers:
    """Buffers of the recordings' inputs and results.

    copied: True if `gradients` returns a copy of `merged`.
    Attributes merged: the merged gradient [P] of the dense parameters, of `dtype`.
    of_tables: the merged gradient of each table, float32 [V + 1, d]; the last row is meaningless.
    rows: each table with the buffers of its gradient rows.
    key: number of buffer rows in use, per table. Each key has its own recording.
    """

    def __init__(
        self,
        jacobian: Jacobian,
        tables: Tables,
        num_tasks: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        copied: bool,
    ) -> None:
        self.jacobian, self._tables, self._num_tasks = jacobian, tables, num_tasks
        self.merged = torch.zeros(jacobian.buffer.shape[1], dtype=dtype, device=device)
        self._copied = copied
        self.rows: list[tuple[nn.Parameter, StaticRows]] = [
            (table, StaticRows(0, table.shape[1], device)) for table, _ in tables.items()
        ]
        self.of_tables = [torch.zeros(table.shape[0] + 1, table.shape[1], device=device) for table, _ in self.rows]
        sizes = [1, 1, num_tasks**2, *[num_tasks + 1 for _ in self.rows]]
        self._spans = [slice(*span) for span in pairwise(accumulate(sizes, initial=0))]
        # One dtype that holds all numbers, so that one copy transfers them.
        self._numbers = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.key: tuple[int, ...] = ()

    def fill(self, scale: float, factor: float, order: Tensor) -> bool:
        """Fill the buffers for a step. The arguments are those of `RecordedStep.run`.

        Return True if a buffer was replaced by a larger one, so that old recordings are invalid.
        """
        lists = [per_task for _, per_task in self._tables.items()]
        self.key = tuple(capacity_of(sum(len(ids) for task in per_task for ids, _ in task)) for per_task in lists)
        grown = False
        for k, ((table, rows), capacity) in enumerate(zip(self.rows, self.key, strict=True)):
            if capacity > len(rows.ids):
                self.rows[k] = table, StaticRows(capacity, table.shape[1], self._numbers.device)
                grown = True
        numbers = [scale, factor, *order.flatten().tolist()]
        for (_, rows), per_task, capacity in zip(self.rows, lists, self.key, strict=True):
            numbers += rows.fill(per_task, capacity)
        upload_into(self._numbers, torch.tensor(numbers, dtype=torch.float64))
        return grown

    def numbers(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return the numbers that `fill` copied to the device.

        These are scale and factor, float32 0-dim; order, int64 [T, T]; and for each table the
        bounds of the tasks among its gradient rows, int64 [T + 1].
        """
        scale, factor, order, *bounds = (self._numbers[span] for span in self._spans)
        whole = [each.long() for each in (order, *bounds)]
        return scale[0].float(), factor[0].float(), whole[0].view(self._num_tasks, -1), whole[1:]

    def gradients(self) -> Merged:
        found = self.jacobian.split(self.merged.clone() if self._copied else self.merged)
        for (table, _), out in zip(self.rows, self.of_tables, strict=True):
            found[id(table)] = out[:-1].clone() if table.dtype == torch.float32 else out[:-1]
        return found

    def tensors(self) -> list[Tensor]:
        return [self.merged, *self.of_tables, *(part for _, rows in self.rows for part in (rows.ids, rows.rows))]
