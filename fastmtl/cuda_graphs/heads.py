"""Heads and losses, forward and backward, as recordings that the host starts by one call each (CUDA graphs).

A recording begins at the sequences' vectors: what makes these, the pooling, reads the tokens' bounds, of which no two
batches have the same. So it serves every batch with as many examples and sequences of each task, whatever its tokens.
Dropout draws from torch's generator what it would draw unrecorded. One memory is shared, as by the layers (graphs.py).
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmtl.config import Recipe
from fastmtl.cuda_graphs.buffers.heads import Losses, StaticHeads
from fastmtl.cuda_graphs.options import heads_unsupported_reason
from fastmtl.cuda_graphs.recorder import Recorder, Recordings, Turn
from fastmtl.model.heads.batch import HeadBatch, Vectors
from fastmtl.surgery.random_state import RandomState

# Recordings kept. One that served none of so many batches gives way to a new one.
MOST = 16
IDLE = 500
# Sizes that were seen and may come again; a recording for each that is seen once would cost more than it saves.
_SEEN = 256
# Of so many batches in a row half without a recording are worth telling.
_WINDOW = 100
_WARM_UPS = 2
# Of weights' addresses, after which recording anew would cost more than it saves.
_CHANGES = 8


class Recorded:
    """The heads for one key, and what runs them. used: the number of the last batch."""

    def __init__(self, static: StaticHeads, recordings: Recordings, device: torch.device) -> None:
        """static: filled; its batch is what warming up runs."""
        self.static, self.used = static, 0
        random = RandomState.capture(device)
        functions = {"forward": static.forward, "backward": static.backward}
        try:
            found = recordings.record(functions, [partial(_run, static)] * _WARM_UPS)
        finally:
            random.restore()
        self.forward, self.backward = found["forward"], found["backward"]
        static.release()


def _run(static: StaticHeads) -> None:
    static.forward()
    static.backward()
    static.release()


class HeadGraphs:
    """Recordings of a model's heads and losses.

    losses: the losses of the T tasks, computed by `heads`. recorder: None for CUDA graphs.
    """

    def __init__(self, heads: nn.ModuleList, losses: Losses, recipe: Recipe, recorder: Recorder | None = None) -> None:
        self._heads, self._losses, self._recipe = heads, losses, recipe
        self.recordings = Recordings(recorder)
        self._checks_device = recorder is None
        self._modules: list[nn.Module] = []
        self._kept: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._of: tuple[Any, ...] = ()
        self._against = ""
        self._changes = self._number = 0
        self._missed: deque[int] = deque(maxlen=_WINDOW // 2)

    def run(self, vectors: Vectors, batch: HeadBatch) -> list[Tensor] | None:
        """The tasks' losses, or None: the ordinary path has to be taken. With gradients."""
        if not self._modules:  # walking through them takes longer than looking at them
            self._modules = list(self._heads.modules())
        found = [parameter for module in self._modules for parameter in module._parameters.values()]
        parameters = list(dict.fromkeys(parameter for parameter in found if parameter is not None))
        of = (
            *((x.dtype, x.device, x.requires_grad) for x in vectors.values()),
            *((parameter.data_ptr(), parameter.requires_grad) for parameter in parameters),
        )
        if of != self._of:
            self._of = of
            self._against = self._begin(vectors, parameters)
        reason = self._against or self._against_this(vectors, batch)
        if reason:
            self.recordings.warn_once(f"heads and losses fall back to eager execution: {reason}")
            return None
        recorded = self._find(vectors, batch, parameters)
        if recorded is None:
            return None
        one = Pass(recorded)
        self.recordings.take(one)
        return list(_Replay.apply(one, *vectors.values(), *parameters).unbind())

    def _begin(self, vectors: Vectors, parameters: list[nn.Parameter]) -> str:
        """Drops what was recorded of other weights; why nothing can be of these, "" if it can."""
        self._kept.clear()
        self._changes += 1
        if self._changes > _CHANGES:
            return "the weights' addresses change too often"
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            return "ZeRO 3 gives weights no fixed address"
        if not any(x.requires_grad for x in (*vectors.values(), *parameters)):
            return "they depend on no trained parameter"
        if len({x.dtype for x in (*vectors.values(), *parameters)}) > 1:
            return "their weights and the hidden states differ in dtype"
        against = heads_unsupported_reason(self._recipe)
        if against:
            return against
        device = next(iter(vectors.values())).device
        if self._checks_device and device.type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, the model is on {device.type}"
        self.recordings.begin(device)
        return ""

    def _against_this(self, vectors: Vectors, batch: HeadBatch) -> str:
        if batch.cached is not None:
            return "the batch's pairs are cached"
        if torch.is_autocast_enabled(next(iter(vectors.values())).device.type):
            return "torch_autocast is on"
        return "the previous forward has not run its backward yet" if self.recordings.taken else ""

    def _find(self, vectors: Vectors, batch: HeadBatch, parameters: list[nn.Parameter]) -> Recorded | None:
        """What is recorded for batches of these sizes, filled with this one; None where recording would not pay."""
        key = batch.sizes, tuple(module.training for module in self._modules)
        self._number += 1
        if key not in self._kept and not self._pays(key):
            return None
        if key in self._kept:
            found = self._kept[key]
            found.static.fill(vectors, batch)
        else:
            self._seen.pop(key)
            static = StaticHeads(self._losses, parameters, vectors, batch)
            static.fill(vectors, batch)
            found = self._kept[key] = Recorded(static, self.recordings, next(iter(vectors.values())).device)
        found.used = self._number
        self._kept.move_to_end(key)
        return found

    def _pays(self, key: Hashable) -> bool:
        """Whether sizes come again, and there is room for one more recording."""
        idle = len(self._kept) >= MOST and self._number - next(iter(self._kept.values())).used > IDLE
        if key in self._seen and (idle or len(self._kept) < MOST):
            if idle:
                self._kept.popitem(last=False)
            return True
        self._seen[key] = None
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        self._missed.append(self._number)
        if len(self._missed) == self._missed.maxlen and self._number - self._missed[0] < _WINDOW:
            self.recordings.warn_once(
                "heads and losses fall back to eager execution in most steps: the tasks' numbers of examples differ "
                "too much from batch to batch"
            )
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadGraphs:
        """Return new recordings for the copied model."""
        return HeadGraphs(copy.deepcopy(self._heads, memo), copy.deepcopy(self._losses, memo), self._recipe)


class Pass(Turn):
    """One forward and its backward."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded

    def forward(self) -> Tensor:
        self._recorded.forward()
        return self._recorded.static.losses()

    def backward(self, gradients: Tensor) -> list[Tensor | None]:
        """Of the losses [T] -> of the vectors and the parameters."""
        self.end()
        static = self._recorded.static
        static.take(gradients)
        self._recorded.backward()
        static.release()
        return static.gradients()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Pass, *inputs: Tensor) -> Tensor:
        ctx.one = one
        return one.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.one.backward(gradients)
