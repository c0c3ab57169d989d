"""CUDA graphs of heads and losses: one launch for their whole forward, one for their backward.

The input of a recording is the vector of each sequence, after pooling. Pooling itself is not
recorded, since it reads the bounds of the tokens, which differ in every batch. One recording
therefore serves all batches with the same numbers of examples and sequences per task, however many
tokens they have. Dropout draws the same numbers from torch's generator as without a recording.
All recordings share their memory, so a replayed forward has to run its backward before another
forward is replayed.
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
from fastmtl.model.examples import HeadBatch, Vectors
from fastmtl.surgery.random_state import RandomState

# Number of recordings kept. If there are so many, a new one replaces the least recently used, but
# only if that one was not used in the last IDLE batches.
MOST = 16
IDLE = 500
# Number of batch sizes remembered without a recording. A size is recorded when it occurs for the
# second time: for a size that occurs once, a recording costs more than it saves.
_SEEN = 256
# Warn, once, when half of the last _WINDOW batches ran without a recording.
_WINDOW = 100
_WARM_UPS = 2
# Every change of the weights' addresses needs new recordings. After this many changes heads and
# losses run without recordings, since they would cost more than they save.
_CHANGES = 8


class Recorded:
    """The recordings for batches of one size: a forward and a backward.

    used: number of the last batch that was run by these recordings.
    """

    def __init__(self, static: StaticHeads, recordings: Recordings, device: torch.device) -> None:
        """Record forward and backward; torch's random state stays as it was.

        static: the buffers, filled with a batch for the warm-up.
        """
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
    """The recordings of a model's heads and losses, made when a batch size occurs again.

    losses: the function that computes the T tasks' losses by the modules `heads`.
    recorder: None for CUDA graphs, which need an NVIDIA GPU; another recorder runs on any device.
    """

    def __init__(self, heads: nn.ModuleList, losses: Losses, recipe: Recipe, recorder: Recorder | None = None) -> None:
        self._heads, self._losses, self._recipe = heads, losses, recipe
        self.recordings = Recordings(recorder)
        self._checks_device = recorder is None
        self._modules: list[nn.Module] = []
        self._kept: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._of: tuple[Any, ...] = ()
        self._unsupported = ""
        self._changes = self._number = 0
        self._missed: deque[int] = deque(maxlen=_WINDOW // 2)

    def run(self, vectors: Vectors, batch: HeadBatch) -> list[Tensor] | None:
        """Return the T tasks' losses of a batch, summed over its examples, by a recording.

        Return None if there is no recording for this batch: the caller then has to compute them.
        """
        if not self._modules:  # a list is faster than the walk through the modules in each step
            self._modules = list(self._heads.modules())
        found = [parameter for module in self._modules for parameter in module._parameters.values()]
        parameters = list(dict.fromkeys(parameter for parameter in found if parameter is not None))
        of = (
            *((x.dtype, x.device, x.requires_grad) for x in vectors.values()),
            *((parameter.data_ptr(), parameter.requires_grad) for parameter in parameters),
        )
        if of != self._of:
            self._of = of
            self._unsupported = self._begin(vectors, parameters)
        reason = self._unsupported or self._unsupported_forward(vectors, batch)
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
        """Drop all recordings, since the weights or the kind of vectors changed.

        Return why new recordings cannot be made, "" if they can.
        """
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
        reason = heads_unsupported_reason(self._recipe)
        if reason:
            return reason
        device = next(iter(vectors.values())).device
        if self._checks_device and device.type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, the model is on {device.type}"
        self.recordings.begin(device)
        return ""

    def _unsupported_forward(self, vectors: Vectors, batch: HeadBatch) -> str:
        """Return why this one forward cannot be replayed, "" if it can."""
        if batch.cached is not None:
            return "the batch's pairs are cached"
        if torch.is_autocast_enabled(next(iter(vectors.values())).device.type):
            return "torch_autocast is on"
        return "the previous forward has not run its backward yet" if self.recordings.taken else ""

    def _find(self, vectors: Vectors, batch: HeadBatch, parameters: list[nn.Parameter]) -> Recorded | None:
        """Return the recordings for the batch's sizes, their buffers filled with this batch.

        They are made if there are none. Return None if making them does not pay (`_pays`).
        """
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
        """Return True if a new recording for these sizes pays.

        It pays if the sizes have occurred before and one more recording can be kept; an idle one is
        then dropped. Otherwise the sizes are remembered.
        """
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
        """Return graphs of the copied model, without recordings: these read the old weights."""
        return HeadGraphs(copy.deepcopy(self._heads, memo), copy.deepcopy(self._losses, memo), self._recipe)


class Pass(Turn):
    """One replayed forward and its backward."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded

    def forward(self) -> Tensor:
        self._recorded.forward()
        return self._recorded.static.losses()

    def backward(self, gradients: Tensor) -> list[Tensor | None]:
        """Replay the backward for the gradients [T] of the losses.

        Return the gradients of all vectors, followed by those of all parameters.
        """
        self.begin_backward()
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
