"""The encoder's layers, forward and backward, as recordings that the host starts by one call each (CUDA graphs).

A recording serves every batch of its bucket: rows in steps of 256, and the attention plan's sizes. It reads what is
copied into its buffers before, and writes J at its fixed address. All recordings share their memory: a forward and its
backward run before the next forward, else that one takes the ordinary path, as everything does that is not recorded;
the log says so once for each reason.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.context import ForwardContext
from fastmtl.model.graph_options import why_not
from fastmtl.model.static_batch import Bucket, rows_of
from fastmtl.model.static_layers import StaticLayers
from fastmtl.recorders import Recorder, Recordings
from fastmtl.surgery.task_gradients import NOT_ARMED, TaskGradients
from fastmtl_kernels.varlen_attention_plan import AttentionPlan

# Recordings kept; with as many, a batch takes a larger one that holds it before one is dropped for a new one.
MOST = 16
_WARM_UPS = 2
# Of weights' addresses or the sink, after which recording anew would cost more than it saves.
_CHANGES = 8


class Recorded:
    """The layers of one bucket, and what runs them. backward: by `stores`."""

    def __init__(self, static: StaticLayers, recordings: Recordings) -> None:
        self.static = static
        ways = {stores: partial(static.backward, stores=stores) for stores in static.ways}
        harmless = [way for stores, way in ways.items() if static.keeps(stores=stores)]
        static.fill_empty()
        assert recordings.recorder is not None
        for _ in range(_WARM_UPS):
            recordings.recorder.warm_up(partial(_run, static.forward, *harmless))
        static.release()
        found = recordings.record({None: static.forward, **ways})
        self.forward = found.pop(None)
        self.backward = found
        static.release()


def _run(*functions: Callable[[], None]) -> None:
    for function in functions:
        function()


class LayerGraphs:
    """Of an encoder's layers, with heads of head_dim columns. recorder: None for CUDA graphs, where they can be.

    told: why something was not recorded.
    """

    def __init__(self, layers: nn.ModuleList, head_dim: int, recorder: Recorder | None = None) -> None:
        self._layers, self._head_dim = layers, head_dim
        self.recordings = Recordings(recorder)
        self._checks_device = recorder is None
        self._places: list[tuple[dict[str, Any], str]] = []
        self._kept: OrderedDict[tuple[Bucket, int], Recorded] = OrderedDict()
        self._of: tuple[Any, ...] = ()
        self._against = ""
        self._changes = 0
        self._gradients: Tensor | None = None
        self._waiting: ref[Pass] | None = None

    def run(
        self, hidden: Tensor, batch: PackedBatch, context: ForwardContext, extra: Sequence[str] = ()
    ) -> Tensor | None:
        """The layers' result [n, d] for hidden [n, d], or None: the ordinary path has to be taken.

        context: of the batch, in training. extra: what the forward has besides the layers.
        """
        if not len(hidden):
            return None
        sink, parameters = context.armed, self._parameters()
        of = (sink, hidden.dtype, hidden.device, *(parameter.data_ptr() for parameter in parameters))
        if of != self._of:
            self._of = of
            self._against = self._begin(hidden, parameters, sink)
        reason = f"it has {extra[0]}" if extra else self._against or self._against_this(hidden, sink)
        if reason:
            self.recordings.tell(f"this forward takes the ordinary path: {reason}")
            return None
        assert context.seeds is not None
        recorded, plan = self._find(hidden, batch, parameters, sink)
        recorded.static.fill(hidden.detach(), batch.host, plan, context.seeds)
        one = Pass(recorded, batch, parameters, sink)
        self._waiting = ref(one)
        return _Replay.apply(hidden, one, *([] if sink is not None else parameters))

    def _parameters(self) -> list[nn.Parameter]:
        """The trained ones. Module.parameters takes a third of a millisecond for 12 layers."""
        if not self._places:
            modules = list(self._layers.modules())
            self._places = [(module._parameters, name) for module in modules for name in module._parameters]
        found = [parameters[name] for parameters, name in self._places]
        return [parameter for parameter in found if parameter is not None and parameter.requires_grad]

    def _begin(self, hidden: Tensor, parameters: list[nn.Parameter], sink: TaskGradients | None) -> str:
        """Drops what was recorded of other weights or for another sink; why nothing can be of these, "" if it can."""
        self._kept.clear()
        self._gradients = None
        self._changes += 1
        if self._changes > _CHANGES:
            return "the weights' addresses or the sink change too often"
        if not parameters:
            return "the encoder is frozen"
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            return "ZeRO 3 gives weights no fixed address"
        if any(getattr(module, "other", None) is not None for module in self._layers.modules()):
            return "LayerNorm is not fastmtl's"
        if sink is not None and not all(sink.wants(p) and not sink.is_sparse(p) for p in parameters):
            return "not all of the layers' weights are shared ones"
        grouped = [] if sink is None else [size for p in parameters if p.dim() == 2 for size in p.shape]
        if any(size * hidden.element_size() % 16 for size in grouped):
            return "products over tasks' rows need widths of whole 16 bytes"
        against = why_not(hidden, self._head_dim, grouped=sink is not None) if self._checks_device else ""
        if against:
            return against
        if sink is None:
            if any(parameter.dtype != hidden.dtype for parameter in parameters):
                return "the weights are not of the hidden states' dtype"
            numbers = sum(parameter.numel() for parameter in parameters)
            self._gradients = torch.zeros(numbers, dtype=hidden.dtype, device=hidden.device)
        self.recordings.begin(hidden.device)
        return ""

    def _against_this(self, hidden: Tensor, sink: TaskGradients | None) -> str:
        if sink is not None and sink.mode != "stack":
            return "the task gradients are not kept in J"
        if torch.is_autocast_enabled(hidden.device.type):
            return "it is under torch_autocast"
        if not hidden.requires_grad:
            return "the embeddings are frozen"
        waiting = None if self._waiting is None else self._waiting()
        return "the backward of the one before has not been yet" if waiting is not None and not waiting.done else ""

    def _find(
        self, hidden: Tensor, batch: PackedBatch, parameters: list[nn.Parameter], sink: TaskGradients | None
    ) -> tuple[Recorded, AttentionPlan]:
        """What is recorded for a bucket that holds the batch, and the batch's plan for its rows."""
        plan = AttentionPlan.make(batch.host.cu_seqlens, rows_of(len(hidden)))
        bucket = Bucket.of(len(hidden), plan)
        key = bucket, batch.num_tasks
        if key not in self._kept and len(self._kept) >= MOST:
            for other, num_tasks in sorted(self._kept, key=lambda kept: kept[0].rows):
                if num_tasks == batch.num_tasks and other.holds(bucket):
                    wider = AttentionPlan.make(batch.host.cu_seqlens, other.rows)
                    if len(wider.tile_rows) <= other.tiles:
                        key, plan = (other, num_tasks), wider
                        break
            else:
                self._kept.popitem(last=False)
        if key not in self._kept:
            static = StaticLayers(self._layers, parameters, bucket, batch.num_tasks, hidden, sink, self._gradients)
            self._kept[key] = Recorded(static, self.recordings)
        self._kept.move_to_end(key)
        return self._kept[key], plan

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGraphs:
        """Of a copied encoder, which records for itself."""
        return LayerGraphs(copy.deepcopy(self._layers, memo), self._head_dim)


class Pass:
    """One forward and its backward. done: whether the backward has been."""

    def __init__(
        self, recorded: Recorded, batch: PackedBatch, parameters: list[nn.Parameter], sink: TaskGradients | None
    ) -> None:
        self.done = False
        offsets = batch.host.token_offsets
        self._tasks = [task for task in range(batch.num_tasks) if offsets[task + 1] > offsets[task]]
        self._num_rows = offsets[-1]
        self._recorded, self._parameters, self._sink = recorded, parameters, sink

    def forward(self) -> Tensor:
        if self._sink is not None:
            self._sink.expect(*self._parameters)
        self._recorded.forward()
        return self._recorded.static.result(self._num_rows)

    def backward(self, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the input and, without a sink, those of the parameters."""
        if self.done:
            raise RuntimeError("encoder.cuda_graphs: a forward has one backward: what it kept is overwritten after it")
        self.done = True
        static, writes, stores = self._recorded.static, self._recorded.static.writes, True
        static.take(dy)
        if writes is not None:
            assert self._sink is not None
            if self._sink.mode != "stack":
                raise RuntimeError(NOT_ARMED)
            stores = writes.jacobian.take(self._parameters, self._tasks)
        self._recorded.backward[stores]()
        static.release()
        if writes is not None and self._sink is not None:
            writes.tell(self._sink)
        return static.result(self._num_rows), static.parameter_gradients()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, one: Pass, *parameters: nn.Parameter) -> Tensor:
        ctx.one = one
        return one.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, gradients = ctx.one.backward(dy)
        return dx, None, *gradients
