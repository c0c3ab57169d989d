"""Weights of the tasks that need the squares of their gradients, summed over the steps.

A rule (RiskWeights) turns T excess risks into T weights. The excess risk of task t is
E_t = sum_p g_tp^2 / sqrt(S_tp + 1e-7), where g_t is its gradient in this step and S_t is the sum of
g_t^2 over all steps, this one included. It estimates how far the task's loss is above its minimum:
g^T H^-1 g, with AdaGrad's diagonal matrix in place of the Hessian H.
Source: He et al. 2024, "Robust Multi-Task Learning with Excess Risks", equations 6 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl.surgery.jacobian.compact_rows import Rows
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.ranks.collectives import BUCKET, sum_over_ranks, world_size
from fastmtl.surgery.ranks.shares import own_columns, own_share, whole_columns, whole_of_shares
from fastmtl_kernels.upload import upload

SQUARES = "squares."  # before the parameters' names in a checkpoint
EPSILON = 1e-7


class RiskWeights(Protocol):
    """Rule that turns the tasks' excess risks into their weights, and keeps state between steps."""

    def weights(self, risks: Tensor, present: Tensor) -> Tensor:
        """Return the weights [T] of a step, without changing the state.

        risks: float64 [T], not finite in a step that will be skipped. present: bool [T], the tasks
        with a gradient.
        """
        ...

    def accept(self) -> None:
        """Take over the state after the last `weights`, whose step has been taken."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Balance:
    """The sums S [T, P] of squared task gradients, float32, and the rule that uses them.

    A sink passes J's columns to `take` and `take_table` while it computes the Gramian. Each rank
    has S for its share of the columns, and of each embedding table's width.
    """

    def __init__(self, rule: RiskWeights, parameters: Sequence[nn.Parameter], num_tasks: int) -> None:
        self._rule, self._num_tasks = rule, num_tasks
        self._shapes = {id(parameter): whole_shape(parameter) for parameter in parameters}
        self._scale = 1.0
        self._columns: dict[tuple[int, ...], Tensor] = {}  # of this step
        self._rows: dict[int, Sequence[Rows]] = {}
        self._sums: dict[tuple[int, ...], Tensor] = {}  # by the ids of the parameters in the columns
        self._table_sums: dict[int, Tensor] = {}
        self._loaded: dict[int, Tensor] = {}  # whole sums from a checkpoint, until they are first used

    def begin(self, scale: float) -> None:
        """Begin a step. scale: the loss scale that its task gradients contain."""
        self._scale = scale
        self._drop()

    def take(self, keys: tuple[int, ...], columns: Tensor) -> None:
        """Take this rank's share [T, n] of the columns of some parameters, as `scatter` gives it.

        keys: ids of the parameters in the order of their columns. The columns are read until the
        weights of the step are known.
        """
        self._columns[keys] = columns
        if keys not in self._sums:
            dtype = torch.promote_types(columns.dtype, torch.float32)
            self._sums[keys] = self._start(keys, columns, dtype)

    def take_table(self, key: int, tasks: Sequence[Rows]) -> None:
        """Take the T gradients of an embedding table, summed over ranks: pairs from `coalesce`."""
        self._rows[key] = tasks
        if key not in self._table_sums:
            device = tasks[0][1].device
            if key in self._loaded:
                part = self._loaded.pop(key)[:, :, own_columns(self._shapes[key][1])]
                self._table_sums[key] = upload(part.contiguous(), device)
            else:
                rows, width = self._shapes[key]
                mine = len(range(width)[own_columns(width)])
                dtype = torch.promote_types(tasks[0][1].dtype, torch.float32)
                self._table_sums[key] = torch.zeros(self._num_tasks, rows, mine, dtype=dtype, device=device)

    def weights(self, gram: Tensor) -> Tensor:
        """Return the tasks' weights, float32 [T], for the gradients taken since `begin`.

        gram: their Gramian [T, T]. Every rank must call this method, and gets equal weights.
        """
        total = torch.zeros(self._num_tasks, dtype=torch.float64, device=gram.device)
        for square, sums in self._squares():
            total += (square / (sums + square).add_(EPSILON).sqrt_()).sum(1, dtype=torch.float64)
        for task, square, sums, ids in self._row_squares():
            total[task] += (square / (sums.index_select(0, ids) + square).add_(EPSILON).sqrt_()).sum(
                dtype=torch.float64
            )
        return self._rule.weights(sum_over_ranks(total), gram.diagonal() > 0).to(gram.dtype)

    def finish(self, *, accepted: bool) -> None:
        """End a step. accepted: its gradients were finite, so they count for later steps."""
        if accepted:
            for square, sums in self._squares():
                sums += square
            for _, square, sums, ids in self._row_squares():
                sums.index_add_(0, ids, square)
            self._rule.accept()
        self._drop()

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors that are kept from step to step."""
        return [*self._sums.values(), *self._table_sums.values()]

    def tensors(self, names: Mapping[int, str]) -> dict[str, Tensor]:
        """Return S by the parameters' names, [T, *shape], on the CPU of rank 0; {} on other ranks.

        names: by id. Every rank must call this method. S is whole, so it suits any number of ranks.
        """
        found = dict(self._loaded)
        for keys, sums in self._sums.items():
            sizes = [self._shapes[key].numel() for key in keys]
            whole = whole_of_shares(sums, sum(sizes))
            if whole is not None:
                found.update(zip(keys, whole.split(sizes, dim=1), strict=True))
        for key, sums in self._table_sums.items():
            whole = whole_columns(sums, self._shapes[key][1])
            if whole is not None:
                found[key] = whole
        if world_size() > 1 and dist.get_rank() > 0:
            return {}
        shapes = self._shapes
        return {
            f"{SQUARES}{names[key]}": whole.reshape(self._num_tasks, *shapes[key]).clone()
            for key, whole in found.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        """Take S from tensors of `tensors`; other names are ignored."""
        by_name = {f"{SQUARES}{names[key]}": key for key in self._shapes}
        self._loaded = {by_name[name]: tensor for name, tensor in tensors.items() if name in by_name}
        self._sums, self._table_sums = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return self._rule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rule.load_state_dict(state)

    def _drop(self) -> None:
        self._columns, self._rows = {}, {}

    def _start(self, keys: tuple[int, ...], columns: Tensor, dtype: torch.dtype) -> Tensor:
        """Return this rank's share of S, zeros or from a checkpoint."""
        if not any(key in self._loaded for key in keys):
            return torch.zeros_like(columns, dtype=dtype)
        parts = [
            self._loaded.pop(key).reshape(self._num_tasks, -1)
            if key in self._loaded
            else torch.zeros(self._num_tasks, self._shapes[key].numel())
            for key in keys
        ]
        return upload(own_share(torch.cat(parts, 1)).to(dtype).contiguous(), columns.device)

    def _squares(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield squares [T, n] of this step and their places in S, in pieces that bound memory."""
        size = max(1, BUCKET // self._num_tasks)
        for keys, columns in self._columns.items():
            for piece, sums in zip(columns.split(size, 1), self._sums[keys].split(size, 1), strict=True):
                yield (piece.to(sums.dtype) / self._scale).square_(), sums

    def _row_squares(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield for each task and table its squares [k, n], S [V, n] and the k rows' numbers.

        Repetitions of a row's number have squares of 0.
        """
        for key, tasks in self._rows.items():
            part = own_columns(self._shapes[key][1])
            for task, (ids, rows) in enumerate(tasks):
                yield task, (rows[:, part] / self._scale).square_(), self._table_sums[key][task], ids
