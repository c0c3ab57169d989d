"""Surgery on the task gradients of features, and one backward pass of the trunk.

    g_t = dL_t / dz          weights = method(G),  G[s, t] = <g_s, g_t>
    the trunk's gradient is that of <sum_t weights[t] g_t, z>, all others are those of sum_t L_t

Source: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018, section 3.3. It
is an upper bound of MGDA, and IMTL-G (Liu et al., 2021) uses it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl.errors import UserError
from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.checks import FEATURES_OUTSIDE
from fastmtl.surgery.clipping import check_max_norm
from fastmtl.surgery.features.edges import chains_of, check_independent
from fastmtl.surgery.features.gradients import Found, Readers, backward_of_each, by_task
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.ranks.collectives import max_over_ranks, sum_over_ranks, world_size
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl.surgery.steps.joint import ClippedJointStep, JointStep
from fastmtl_kernels import combine, gramian

# The features' merged gradients, and the sums of the tasks' gradients.
Pairs = tuple[list[Tensor], list[Tensor]]

# Bounds of the difference between a backward of all losses and one of each.
_TOLERANCE, _NARROW_TOLERANCE = 1e-3, 5e-2


class FeaturesStep:
    """One optimizer step. Each micro-batch has weights of its own, from its rows on all ranks.

    sink: never armed. by_rank: True if each rank has its own Gramians (`reduce: local`). merges:
    False for a plain sum.
    """

    def __init__(self, parts: Parts, sink: Sink, step: Step, *, by_rank: bool, merges: bool) -> None:
        check_max_norm(parts.max_norm, parts.target, "none", "exact", joint=True)
        kind = JointStep if parts.max_norm is None else ClippedJointStep
        self._joint = kind(parts, sink, step)
        self._parts, self._sink, self._step, self._by_rank, self._merges = parts, sink, step, by_rank, merges
        number, device = len(parts.tasks), parts.target.device
        self._gram, self._merged_square = torch.zeros(number, number, device=device), torch.zeros((), device=device)
        self._weights: list[Tensor] = []
        self._factor = torch.ones((), device=device)  # of the losses, in the target's backward
        self._norm = torch.ones((), device=device)  # of the tasks' gradients of all features
        self._difference, self._tolerance = torch.zeros((), device=device), _TOLERANCE
        self._nbytes = 0

    def run(self, micro_batches: Sequence[Any], losses_of: LossFunction) -> SurgeryInfo:
        """Run all micro-batches; the target then has the gradient. Return the report."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            with profile_range("forward"):
                own_model = self._joint.own_backward and (self._parts.target.one_backward or not self._merges)
                given: Any = losses_of(micro_batch, self._sink, training_pass=own_model)
            if not isinstance(given, tuple | list) or len(given) != 2:
                raise UserError(f"loss_fn returns {type(given).__name__}: with features=True return (losses, features)")
            self.backward(*given, last=number == len(micro_batches))
            del given
        return self.finish()

    def backward(self, losses: Losses, features: Any, *, last: bool) -> None:
        """Run backward for one micro-batch.

        Raises UserError for a forward that has passed gradients of the trunk to the sink.
        """
        if self._sink.active:
            raise UserError(FEATURES_OUTSIDE)
        if self._merges and not self._parts.target.one_backward:
            self._parts.target.check_forward()  # DeepSpeed takes every backward of its outputs for its own
        self._step.take(losses)
        with ExitStack() as stack:
            if self._merges:
                stack.enter_context(self._merging(losses, chains_of(features)))
            self._joint.add(losses, last=last, watch=self._watch if self._merges else None)

    def finish(self) -> SurgeryInfo:
        """Return the report of the step.

        Raises TrainingError for gradients of features that are not finite, unless the target backs
        off, and UserError if a second backward of a loss differs from the first: the target has
        these gradients already, but no update.
        """
        info, parts = self._joint.finish(), self._parts
        if not self._merges or info.skipped is not None:
            return info
        gram = sum_over_ranks(self._gram) / world_size() if self._by_rank else self._gram
        difference = max_over_ranks(self._difference[None])
        host = torch.cat([gram.flatten(), self._merged_square[None], difference, *self._weights[:1]]).cpu()
        number = len(parts.tasks)
        gram, merged, differs, weights = host.split([number**2, 1, 1, number])
        gram = gram.view(number, number)
        if differs > self._tolerance:
            raise UserError(
                f"features: the backward of all losses gives them another gradient than a backward of each (difference "
                f"{float(differs):.1g} of the norm), so an operation changes its saved tensors in backward, as some "
                "fused losses do: use a plain loss"
            )
        for name, square in zip(parts.tasks, gram.diagonal().tolist(), strict=True):
            if not torch.isfinite(torch.tensor(square)):
                if parts.target.backs_off():
                    return info
                parts.solver.fail("gradient", f"task {name}")
        known = not self._by_rank and len(self._weights) == 1
        return SurgeryInfo.of_gramian(
            info.losses,
            gram.numpy(),
            weights.numpy() if known else None,
            None if self._by_rank else float(merged),
            total_norm=info.total_norm,
            nbytes=self._nbytes,
            stop=info.stop,
        )

    @contextmanager
    def _merging(self, losses: Losses, chains: list[list[GradientEdge]]) -> Iterator[None]:
        """Replace the features' gradients, in the backward inside the block, by merged ones."""
        tensors = {name: loss for name, (loss, _) in losses.items() if loss.requires_grad}
        with ExitStack() as stack:
            if self._parts.target.one_backward:
                readers = Readers(tensors, chains)
                stack.enter_context(readers.recording())
                edges = readers.edges

                def merge() -> Pairs:
                    readers.check_complete()
                    return self._merge(readers.found, losses, self._factor)
            else:
                scale = self._parts.target.loss_scale()
                of_each = {name: (loss, self._step.factor(name) * scale) for name, loss in tensors.items()}
                edges, found = backward_of_each(of_each, chains)
                # Before the backward of all losses, whose collectives must not mix with this one.
                merged, total = self._merge(found, losses, torch.full_like(self._factor, scale))

                def merge() -> Pairs:
                    ratio = self._factor / scale
                    self._norm *= ratio
                    return [g * ratio.to(g.dtype) for g in merged], [g * ratio.to(g.dtype) for g in total]

            if len(edges) > 1:
                check_independent(edges)
            for hook in self._hooks(edges, merge):
                stack.callback(hook.remove)
            yield

    def _watch(self, factor: Tensor) -> None:
        self._factor = factor.float()

    def _merge(self, found: Found, losses: Losses, scale: Tensor) -> Pairs:
        """Return the features' merged gradients, and the sums of those of the tasks.

        scale: the factor that `found` contains.
        """
        parts = self._parts
        for name, (_, rows) in losses.items():
            if rows and not any(name in of_feature for of_feature in found):
                raise UserError(f"features: the loss of task {name} depends on none of them: give what its head reads")
        gradients = by_task(found, parts.tasks)
        gram = gramian(gradients).float()
        self._norm = gram.trace().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        gram = gram / scale**2
        gram = gram if self._by_rank else sum_over_ranks(gram)
        weights = parts.solver.weights(gram)
        self._weights.append(weights)
        self._gram += gram
        self._merged_square += weights @ gram @ weights
        self._nbytes = max(self._nbytes, sum(gradient.nbytes for of_task in gradients for gradient in of_task))
        merged, total = combine(gradients, weights), combine(gradients, torch.ones_like(weights))
        assert isinstance(merged, list) and isinstance(total, list)
        return merged, total

    def _hooks(self, edges: Sequence[GradientEdge], merge: Callable[[], Pairs]) -> list[Any]:
        """Register hooks that replace the edges' gradients by merged ones.

        merge: called once; returns the edges' merged gradients, and the sums of the tasks', with
        which those of the backward are compared.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def replacing(k: int, number: int) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def replace(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                if not found:
                    found.extend(zip(*merge(), strict=True))
                merged, total = found[k]
                self._compare(gradients[number], total)
                return tuple(merged if n == number else gradient for n, gradient in enumerate(gradients))

            return replace

        return [edge.node.register_prehook(replacing(k, edge.output_nr)) for k, edge in enumerate(edges)]

    def _compare(self, gradient: Tensor, total: Tensor) -> None:
        """Record the difference between a feature's gradient and the sum of the tasks'."""
        if gradient.dtype.itemsize < 4:
            self._tolerance = _NARROW_TOLERANCE
        difference = torch.linalg.vector_norm((gradient - total).float()) / self._norm
        self._difference = torch.maximum(self._difference, difference)
