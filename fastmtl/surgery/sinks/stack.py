"""`storage: stacked`: the sink that stores J."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.jacobian.compact_rows import Rows
from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.jacobian.tables import Tables, whole_shape
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.early_scatter import EarlyScatter
from fastmtl.surgery.sinks.plain import Product
from fastmtl.surgery.sinks.source import MergingSink
from fastmtl_kernels import gramian


class StackSink(MergingSink):
    """Sink that stores J: dense parameters in a `Jacobian`, sparse tables as (ids, rows) per task.

    A new gradient is added to the stored one, since a weight may be used twice in a forward and a
    step may have several micro-batches.

    dtype: of J. early: sends J's columns to other ranks during backward; None if G needs no other
    rank's columns.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
        sketch_size: int | None = None,
    ) -> None:
        super().__init__(parameters, num_tasks, sparse=sparse, ranks=ranks, sketch_size=sketch_size)
        self.dtype = dtype
        self.early: EarlyScatter | None = None
        self._jacobian: Jacobian | None = None

    def arm(self, device: torch.device) -> None:
        super().arm(device)
        if self._jacobian is None:
            self._jacobian = Jacobian(self.dense, self.num_tasks, self.dtype, device)
            if self.dense and self.scatters and not self.sketches:
                self.early = EarlyScatter(self._jacobian)
        self._uses.counting = self.early is not None

    def forward_done(self, *, last: bool = False) -> None:
        """End the count of uses. During the step's last backward, `early` may then send pieces."""
        super().forward_done(last=last)
        if last and self.early is not None:
            self.early.begin(self._uses.left)

    def written(self, parameter: nn.Parameter) -> None:
        """Record that a use of a dense parameter has written its gradient into J."""
        if self.early is None:
            return
        key = id(parameter)
        if self.early.is_sent(key):
            raise RuntimeError("a weight's task gradients were sent to the other ranks before its last use had written")
        if self.early.begun and self._uses.count_delivery(key):
            self.early.complete(key)

    @property
    def jacobian(self) -> Jacobian:
        """J of the dense parameters."""
        assert self._jacobian is not None, "J is made when the sink is armed"
        return self._jacobian

    def stack_of(self, parameter: nn.Parameter) -> Jacobian:
        """Return the Jacobian that takes a dense parameter's gradients.

        Raises UserError for a parameter in `sparse`.
        """
        if id(parameter) in self._sparse:
            raise UserError(
                f"sparse: the parameter of shape {tuple(whole_shape(parameter))} is used by an op with a dense "
                "gradient: leave it out of `sparse`, which is for embedding tables alone"
            )
        return self.jacobian

    def stacked(self) -> tuple[Jacobian, Tables]:
        """Return the two parts of J: dense parameters, and sparse tables."""
        return self.jacobian, self._tables

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        self.stack_of(parameter).add(parameter, gradients)
        self.written(parameter)
        return None

    def take_tasks(self, parameter: nn.Parameter, gradients: Mapping[int, Tensor]) -> Tensor | None:
        for task, gradient in gradients.items():
            if task >= 0:
                self.stack_of(parameter).add_task(parameter, task, gradient)
        self.written(parameter)
        return None

    def take_products(self, parameter: nn.Parameter, dy: Tensor, product: Product, segments: Segments) -> Tensor | None:
        """Take a dense parameter's T gradients, computed and added to J one task at a time.

        All T at once would be a temporary tensor as large as the parameter's part of J. Arguments
        and result: see `Sink.products`.
        """
        stack = self.stack_of(parameter)
        for task, rows in enumerate(segments.rows()):
            if rows.stop > rows.start:
                stack.add_task(parameter, task, product(dy, rows))
        self.written(parameter)
        return None

    def linear(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        dy: Tensor,
        x: Tensor,
        segments: Segments,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take the task gradients of a Linear. Arguments and result: see Sink.linear.

        If `dy` has J's dtype, each product is computed inside J, without a temporary tensor.
        """
        if self.dtype != dy.dtype or not self.takes(weight) or not (bias is None or self.takes(bias)):
            return super().linear(weight, bias, dy, x, segments, needed)
        self.check_active()
        stack = self.stack_of(weight)
        left, right = segments.split(dy.t(), dim=1), segments.split(x)
        for task, (columns, rows) in enumerate(zip(left, right, strict=True)):
            if len(rows):
                stack.add_product(weight, task, columns, rows)
                if bias is not None:
                    stack.add_sum(bias, task, columns)
        self.written(weight)
        if bias is not None:
            self.written(bias)
        return None, None

    def linears(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter],
        rows: Tensor,
        x: Tensor,
        segments: Segments,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Take the task gradients of k Linears. Arguments and result: see Sink.linears.

        If the k weights' columns in J are adjacent, a single product per task computes them.
        """
        parameters = [*weights, *biases]
        if self.dtype != rows.dtype or not all(map(self.takes, parameters)):
            return super().linears(weights, biases, rows, x, segments, needed)
        self.check_active()
        weight_stack, bias_stack = self.stack_of(weights[0]), self.stack_of(biases[0])
        left, right = segments.split(rows.t(), dim=1), segments.split(x)
        for task, (columns, inputs) in enumerate(zip(left, right, strict=True)):
            if len(inputs):
                weight_stack.add_products(weights, task, columns, inputs)
                bias_stack.add_sums(biases, task, columns)
        for parameter in parameters:
            self.written(parameter)
        return [None] * len(parameters)

    def dense_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        for task, (ids, rows) in enumerate(pairs):
            if len(ids):
                self.stack_of(table).add_rows(table, task, ids, rows)
        self.written(table)
        return None

    def task_gradient(self, parameter: nn.Parameter, task: int) -> Tensor | None:
        return self.jacobian.of_task(parameter, task)

    def gramian(self) -> Tensor:
        jacobian = self._jacobian
        if self._sketch is not None:
            for parameter in self.dense if jacobian is not None else ():
                self._sketch.add(self._index[id(parameter)], self.jacobian.of(parameter).reshape(self.num_tasks, -1))
            return self._sketched_gramian(self._sketch)
        total = torch.zeros(self.num_tasks, self.num_tasks, device=self.anchor.device)
        if jacobian is not None:
            columns = jacobian.complete() if self.early is None else self.early.shares()
            total += gramian(columns)
            if self.balance is not None and self.dense:
                self.balance.take(tuple(map(id, self.dense)), columns)
            if self.layers is not None:
                spans = list(jacobian.spans().items())
                self.layers.add_columns(columns, self._ranks.spans_of_share(spans, *jacobian.buffer.shape))
        return self._of_all_ranks(total)

    def combine(self, weights: Tensor, *, narrow: bool = False) -> Merged:
        self.jacobian.complete()
        dtype = self.jacobian.narrow if narrow else torch.float32
        merged = self.jacobian.split(self.jacobian.merge(weights, dtype))
        merged.update(self._tables.merged(weights))
        return merged

    def unmerged(self, weights: Tensor) -> tuple[dict[int, list[Tensor]], dict[int, Rows]]:
        """Return the gradients for an optimizer that merges them itself, as two maps by id.

        The first has the T task gradients of every dense parameter, views of J that the next step
        overwrites. The second has (ids, rows) of every sparse table, already merged with `weights`.
        """
        return self.jacobian.rows(), self._tables.merged_rows(weights)

    def reached(self) -> set[int]:
        return super().reached() | self.jacobian.reached

    def clear(self) -> None:
        super().clear()
        if self._jacobian is not None:
            self._jacobian.clear()
        if self.early is not None:
            self.early.reset()

    def tensors(self) -> list[Tensor]:
        return [*([] if self._jacobian is None else [self._jacobian.buffer]), *super().tensors()]
