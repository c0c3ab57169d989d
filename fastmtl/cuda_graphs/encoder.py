"""CUDA graphs of the encoder: one launch for its whole forward, one for its whole backward.

With a sink of task gradients the graphs contain the embeddings and the layers. With
`gradient.method: sum` they contain the layers only: the gradient of an embedding table is then a
whole table, which a graph would have to copy without any gain.

One recording serves all batches of a bucket, a combination of buffer sizes: rows in steps of 256,
tiles and blocks of the attention plan. The recording reads buffers that are filled before, and
writes the task gradients into the Jacobian J at its fixed address.

All recordings share their memory. A replayed forward therefore has to run its backward before
another forward is replayed. A forward that comes too early, or cannot be recorded, falls back to
eager execution; the log gives each reason once.
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
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.layers import overrides_norm
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

# Number of recordings kept. Once there are so many, a batch of a new bucket uses the recording of a
# larger bucket. If there is no larger one, the least recently used recording is replaced.
MOST = 16
_WARM_UPS = 2
# Every change of the weights' addresses or of the sink needs new recordings. After this many
# changes the encoder runs without recordings, since they would cost more than they save.
_CHANGES = 8


class Recorded:
    """The recordings of one bucket: its forward, and its backward for each value of `stores`.

    forward: replays the forward. backward: {stores: replays that backward}. stores: True to
    overwrite the task gradients in J, False to add to them.
    """

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
    """The recordings of one encoder, made when a bucket first occurs and replayed afterwards.

    recorder: None for CUDA graphs, which need an NVIDIA GPU; another recorder runs on any device.
    """

    def __init__(self, encoder: PackedEncoder, recorder: Recorder | None = None) -> None:
        self._encoder = encoder
        self.recordings = Recordings(recorder)
        self._checks_device = recorder is None
        self._places: dict[nn.Module, list[tuple[dict[str, Any], str]]] = {}
        self._kept: OrderedDict[tuple[Bucket, int], Recorded] = OrderedDict()
        self._of: tuple[Any, ...] = ()
        self._unsupported = ""
        self._changes = 0
        self._gradients: Tensor | None = None

    def embeds(self, sink: Sink | None) -> bool:
        """Return True if a recording for this sink includes the embeddings.

        This needs a sink that takes the gradients of all embedding parameters, and among those that
        are trained only the word table as a sparse parameter (kept as rows, not as a table).
        """
        if sink is None or overrides_norm(self._encoder.embeddings):
            return False
        parameters = self._trained(self._encoder.embeddings)
        return all(map(sink.wants, self._encoder.embeddings.parameters())) and [
            parameter for parameter in parameters if sink.is_sparse(parameter)
        ] == [self._encoder.words]

    def run(
        self, hidden: Tensor | None, batch: PackedBatch, context: ForwardContext, extra: Sequence[str] = ()
    ) -> Tensor | None:
        """Run the encoder by a recording, which is made first if there is none for this bucket.

        hidden: the layers' input [n, d]; None if the recording includes the embeddings (`embeds`).
        context: that of the batch, with dropout seeds; its attention plan is not used.
        extra: features of this forward, such as "noise", that no recording supports.
        Return the last hidden states [n, d]. Return None, with a warning, if the forward cannot be
        replayed: the caller then has to run the layers itself.
        """
        if not batch.num_tokens:
            return None
        sink, words, inside = context.armed, self._encoder.words, hidden is None
        parameters = self._in_layers()
        if inside:
            parameters = [*(p for p in self._trained(self._encoder.embeddings) if p is not words), *parameters]
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
        recorded.static.fill(inputs, batch.host, plan, context.seeds.tensor)
        one = Pass(recorded, batch, parameters, sink, words if inside else None)
        self.recordings.take(one)
        begin = sink.anchor if sink is not None and hidden is None else hidden
        return _Replay.apply(begin, one, *([] if sink is not None else parameters))

    def _in_layers(self) -> list[nn.Parameter]:
        """Return the trained parameters of the layers, and of what follows them but the pooler."""
        parts = [part for name, part in self._encoder.named_children() if name not in ("embeddings", "pooler")]
        return [parameter for part in parts for parameter in self._trained(part)]

    def _trained(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the trained parameters of a module.

        The places of the parameters are looked up once: Module.parameters would take 0.3 ms per
        call for 12 layers.
        """
        if module not in self._places:
            parts = list(module.modules())
            self._places[module] = [(part._parameters, name) for part in parts for name in part._parameters]
        found = [parameters[name] for parameters, name in self._places[module]]
        return [parameter for parameter in found if parameter is not None and parameter.requires_grad]

    def _begin(self, words: nn.Parameter, parameters: list[nn.Parameter], sink: Sink | None) -> str:
        """Drop all recordings, since the weights or the sink changed.

        Return why new recordings cannot be made, "" if they can.
        """
        self._kept.clear()
        self._gradients = None
        self._changes += 1
        if self._changes > _CHANGES:
            return "the weights' addresses or the sink change too often"
        if self._encoder.not_recorded:
            return self._encoder.not_recorded
        if not parameters:
            return "the encoder is frozen"
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            return "ZeRO 3 gives weights no fixed address"
        if overrides_norm(self._encoder):
            return "LayerNorm is not fastmtl's"
        if sink is not None and not all(sink.wants(p) and not sink.is_sparse(p) for p in parameters):
            return "some weights of the layers are not shared parameters"
        shared = [] if sink is None else self._in_layers()
        if any(size * words.element_size() % 16 for p in shared if p.dim() == 2 for size in p.shape):
            return "per-task matrix products need widths that are multiples of 16 bytes"
        against = (
            unsupported_reason(words, self._encoder.settings.head_dim, grouped=sink is not None)
            if self._checks_device
            else ""
        )
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
        """Return why this one forward cannot be replayed, "" if it can."""
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
        """Return the recordings of a bucket that the batch fits into; make them if there are none.

        inside: True if the recordings include the embeddings.
        Also return the batch's attention plan for buffers with the bucket's rows.
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
            static = StaticLayers(self._encoder, inside, parameters, bucket, batch.num_tasks, sink, self._gradients)
            self._kept[key] = Recorded(static, self.recordings)
        self._kept.move_to_end(key)
        return self._kept[key], plan

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderGraphs:
        """Return graphs of the copied encoder, without recordings: these read the old weights."""
        return EncoderGraphs(copy.deepcopy(self._encoder, memo))


class Pass(Turn):
    """One replayed forward and its backward.

    words: the word table if the recording includes the embeddings, else None.
    """

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
        """Replay the backward for the gradient dy [n, d] of the last hidden states.

        Return the gradient of the input, and the gradients of the parameters, [] with a sink. If
        the recording includes the embeddings, the input is the sink's anchor: a 0-dim zero tensor
        that makes autograd call this backward.
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
        found = static.input_gradient(self._offsets[-1])
        if writes is not None and self._sink is not None:
            writes.mark_written(self._sink)
            if self._words is not None:
                self._sink.deliver_rows(self._words, self._ids, found, self._offsets)
                found = torch.zeros_like(self._sink.anchor)
        return found, static.parameter_gradients()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begin: Tensor, one: Pass, *parameters: nn.Parameter) -> Tensor:
        """begin: the layers' input, or the sink's anchor if the embeddings are recorded."""
        ctx.one = one
        return one.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, gradients = ctx.one.backward(dy)
        return dx, None, *gradients
