"""CUDA graphs of the encoder: one launch each for its forward and its backward.

With task gradients the graphs contain layers and embeddings. With `sum` they contain the layers
only: the gradient of an embedding table is then a whole table, which a graph would only copy.

A recording serves all batches of a bucket: rows in steps of 256, and sizes of the attention plan.
It reads buffers that are filled beforehand, and writes J at its fixed address. All recordings share
their memory, so a recorded forward has to run its backward before the next forward is replayed.
Otherwise that forward falls back to eager execution, like every forward that cannot be recorded;
the log gives each reason once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmtl.cuda_graphs.buffers.batch import Bucket, rows_of
from fastmtl.cuda_graphs.buffers.layers import StaticLayers
from fastmtl.cuda_graphs.options import unsupported_reason
from fastmtl.cuda_graphs.recorder import Recorder, Recordings, Turn
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.encoder.layers import overrides_norm
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

# Number of recordings kept. Once there are this many, a batch of a new bucket uses a recording of a
# larger bucket. Only where there is none, the least recently used recording is dropped.
MOST = 16
_WARM_UPS = 2
# Changes of the weights' addresses or of the sink after which recording again no longer pays.
_CHANGES = 8


class Recorded:
    """Recordings of one bucket: a forward, and a backward for each value of `stores`."""

    def __init__(self, static: StaticLayers, recordings: Recordings) -> None:
        self.static = static
        ways = {stores: partial(static.backward, stores=stores) for stores in static.ways}
        harmless = [way for stores, way in ways.items() if static.keeps(stores=stores)]
        static.fill_empty()
        warm_up = partial(_run, static.forward, *harmless, static.release)
        found = recordings.record({None: static.forward, **ways}, [warm_up] * _WARM_UPS)
        self.forward = found.pop(None)
        self.backward = found
        static.release()


def _run(*functions: Callable[[], None]) -> None:
    for function in functions:
        function()


class EncoderGraphs:
    """Recordings of an encoder.

    head_dim: columns of an attention head.
    recorder: None for CUDA graphs, which need an NVIDIA GPU.
    """

    def __init__(
        self, embeddings: nn.Module, layers: nn.ModuleList, head_dim: int, recorder: Recorder | None = None
    ) -> None:
        self._embeddings, self._layers, self._head_dim = embeddings, layers, head_dim
        self.recordings = Recordings(recorder)
        self._checks_device = recorder is None
        self._places: dict[nn.Module, list[tuple[dict[str, Any], str]]] = {}
        self._kept: OrderedDict[tuple[Bucket, int], Recorded] = OrderedDict()
        self._of: tuple[Any, ...] = ()
        self._unsupported = ""
        self._changes = 0
        self._gradients: Tensor | None = None

    def embeds(self, sink: Sink | None) -> bool:
        """Return whether the embeddings are recorded too: the sink keeps only the words as rows."""
        if sink is None or overrides_norm(self._embeddings):
            return False
        parameters = self._trained(self._embeddings)
        return all(map(sink.wants, self._embeddings.parameters())) and [
            parameter for parameter in parameters if sink.is_sparse(parameter)
        ] == [self._words()]

    def run(
        self, hidden: Tensor | None, batch: PackedBatch, context: ForwardContext, extra: Sequence[str] = ()
    ) -> Tensor | None:
        """Return the last hidden states [n, d], or None for a forward that is not recorded.

        hidden: the layers' input [n, d]; None where the embeddings are recorded.
        context: of the batch, in training.
        extra: features of the forward that a recording does not support.
        """
        if not batch.num_tokens:
            return None
        sink, words, inside = context.armed, self._words(), hidden is None
        parameters = self._trained(self._layers)
        if inside:
            parameters = [*(p for p in self._trained(self._embeddings) if p is not words), *parameters]
        of = (sink, inside, words.dtype, *(parameter.data_ptr() for parameter in (words, *parameters)))
        if of != self._of:
            self._of = of
            self._unsupported = self._begin(words, parameters, sink)
        reason = f"it uses {extra[0]}" if extra else self._unsupported or self._unsupported_forward(hidden, words, sink)
        if reason:
            self.recordings.warn_once(f"this forward falls back to eager execution: {reason}")
            return None
        assert context.seeds is not None and (sink is None or isinstance(sink, StackSink))
        recorded, plan = self._find(batch, parameters, sink, inside)
        inputs = [batch.input_ids, batch.token_type_ids, batch.position_ids] if hidden is None else [hidden]
        recorded.static.fill(inputs, batch.host, plan, context.seeds)
        one = Pass(recorded, batch, parameters, sink, words if inside else None)
        self.recordings.take(one)
        begin = sink.anchor if sink is not None and hidden is None else hidden
        return _Replay.apply(begin, one, *([] if sink is not None else parameters))

    def _words(self) -> nn.Parameter:
        return self._embeddings.get_submodule("word_embeddings").weight  # type: ignore[return-value]

    def _trained(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the trained parameters; Module.parameters takes 0.3 ms for 12 layers."""
        if module not in self._places:
            parts = list(module.modules())
            self._places[module] = [(part._parameters, name) for part in parts for name in part._parameters]
        found = [parameters[name] for parameters, name in self._places[module]]
        return [parameter for parameter in found if parameter is not None and parameter.requires_grad]

    def _begin(self, words: nn.Parameter, parameters: list[nn.Parameter], sink: Sink | None) -> str:
        """Drop recordings of other weights or another sink; return why these cannot be recorded.

        "" means that they can.
        """
        self._kept.clear()
        self._gradients = None
        self._changes += 1
        if self._changes > _CHANGES:
            return "the weights' addresses or the sink change too often"
        if not parameters:
            return "the encoder is frozen"
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            return "ZeRO 3 gives weights no fixed address"
        if overrides_norm(self._layers):
            return "LayerNorm is not fastmtl's"
        if sink is not None and not all(sink.wants(p) and not sink.is_sparse(p) for p in parameters):
            return "some weights of the layers are not shared parameters"
        shared = [] if sink is None else self._trained(self._layers)
        if any(size * words.element_size() % 16 for p in shared if p.dim() == 2 for size in p.shape):
            return "per-task matrix products need widths that are multiples of 16 bytes"
        against = unsupported_reason(words, self._head_dim, grouped=sink is not None) if self._checks_device else ""
        if against:
            return against
        if sink is None:
            if any(parameter.dtype != words.dtype for parameter in parameters):
                return "the weights and the hidden states differ in dtype"
            numbers = sum(parameter.numel() for parameter in parameters)
            self._gradients = torch.zeros(numbers, dtype=words.dtype, device=words.device)
        self.recordings.begin(words.device)
        return ""

    def _unsupported_forward(self, hidden: Tensor | None, words: nn.Parameter, sink: Sink | None) -> str:
        """Return why this forward cannot be replayed, "" where it can."""
        if sink is not None and not (sink.active and isinstance(sink, StackSink)):
            return "the task gradients are not stored in J"
        if torch.is_autocast_enabled(words.device.type):
            return "torch_autocast is on"
        if hidden is not None and not hidden.requires_grad:
            return "the embeddings are frozen"
        return "the previous forward has not run its backward yet" if self.recordings.taken else ""

    def _find(
        self, batch: PackedBatch, parameters: list[nn.Parameter], sink: StackSink | None, inside: bool
    ) -> tuple[Recorded, AttentionPlan]:
        """Return recordings of a bucket that holds the batch, and the plan for the bucket's rows.

        inside: whether the embeddings are recorded.
        """
        plan = batch.host.plan_of(rows_of(batch.num_tokens))
        bucket = Bucket.of(batch.num_tokens, plan)
        key = bucket, batch.num_tasks
        if key not in self._kept and len(self._kept) >= MOST:
            for other, num_tasks in sorted(self._kept, key=lambda kept: kept[0].rows):
                if num_tasks == batch.num_tasks and other.holds(bucket):
                    wider = batch.host.plan_of(other.rows)
                    if wider.num_tiles <= other.tiles:
                        key, plan = (other, num_tasks), wider
                        break
            else:
                self._kept.popitem(last=False)
        if key not in self._kept:
            embeddings = self._embeddings if inside else None
            words, tasks = self._words(), batch.num_tasks
            static = StaticLayers(self._layers, embeddings, parameters, bucket, tasks, words, sink, self._gradients)
            self._kept[key] = Recorded(static, self.recordings)
        self._kept.move_to_end(key)
        return self._kept[key], plan

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderGraphs:
        """Return new recordings for the copied encoder."""
        return EncoderGraphs(copy.deepcopy(self._embeddings, memo), copy.deepcopy(self._layers, memo), self._head_dim)


class Pass(Turn):
    """One forward and its backward. words: the table, where the embeddings are recorded."""

    def __init__(
        self,
        recorded: Recorded,
        batch: PackedBatch,
        parameters: list[nn.Parameter],
        sink: StackSink | None,
        words: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self._offsets, self._ids = batch.host.token_offsets, batch.input_ids
        self._tasks = [task for task, pair in enumerate(pairwise(self._offsets)) if pair[1] > pair[0]]
        self._recorded, self._parameters, self._sink, self._words = recorded, parameters, sink, words

    def forward(self) -> Tensor:
        if self._sink is not None:
            self._sink.expect(*self._parameters, self._words)
        self._recorded.forward()
        return self._recorded.static.result(self._offsets[-1])

    def backward(self, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradient of the input and, without a sink, those of the parameters.

        Where the embeddings are recorded, the input is the sink's anchor.
        """
        self.begin_backward()
        static, writes, stores = self._recorded.static, self._recorded.static.writes, True
        static.take(dy)
        if writes is not None:
            assert self._sink is not None
            self._sink.check_active()
            stores = writes.jacobian.reserve(self._parameters, self._tasks)
        self._recorded.backward[stores]()
        static.release()
        found = static.result(self._offsets[-1])
        if writes is not None and self._sink is not None:
            writes.mark_written(self._sink)
            if self._words is not None:
                self._sink.deliver_rows(self._words, self._ids, found, self._offsets)
                found = torch.zeros_like(self._sink.anchor)
        return found, static.parameter_gradients()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begin: Tensor, one: Pass, *parameters: nn.Parameter) -> Tensor:
        """begin: the layers' input, or the sink's anchor where the embeddings are recorded."""
        ctx.one = one
        return one.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, gradients = ctx.one.backward(dy)
        return dx, None, *gradients
