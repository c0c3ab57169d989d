"""The sink: the object that takes T task gradients from each shared layer, during one backward.

A layer's backward passes its task gradients to the sink, which returns the gradient for autograd.
There is a sink for each way to use task gradients, and a layer treats all of them alike:

| sink | use of the T gradients | autograd gets |
|---|---|---|
| `StackSink` | stored in J, one buffer `[T, P]` | nothing |
| `KeepSink` | not computed; the factors of a Linear's products are kept | nothing |
| `GramianSink` | added to the Gramian and dropped | nothing |
| `WeightedSink` | not computed; rows are multiplied by their task's weight | the merged gradient |
| `TensorSink` | merged parameter by parameter | the merged gradient |

Shapes: T tasks, P numbers in the dense shared parameters, N rows, V x d an embedding table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.differentiate import Term, differentiate
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.plain import Product, sum_of_products, sum_of_rows, table_gradient
from fastmtl.surgery.sinks.uses import Uses

NOT_ARMED = "the sink was armed in forward but not in backward: keep both inside one `armed` block"


class Sink(ABC):
    """Object that takes the task gradients of `parameters` while `active`: from `arm` to `disarm`.

    parameters: the shared ones that are trained. sparse: those of them whose gradient is kept only
    for the table rows in use (word embeddings); `dense` holds the others.

    ways_out: for the message about a shared parameter whose gradient bypasses the sink.
    per_task: of the target, for messages.
    in_graph: returns the tensor that stands for a parameter in autograd's graph, by default itself.
    in_backward: True from the end of forward to the end of backward. used: True if a layer has used
    the sink since `arm`, or if an attached model has it.

    `anchor` is a zero scalar that requires a gradient. The embedding's output depends on `anchor`.
    So the gradient of a loss with respect to `anchor` needs a backward through every layer, but no
    gradient of a shared parameter from autograd. No hook of a shared parameter is called.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_tasks: int, *, sparse: Sequence[nn.Parameter] = ()
    ) -> None:
        self.num_tasks = num_tasks
        self.active = self.in_backward = self.used = False
        self.anchor = torch.zeros((), requires_grad=True)
        self._sparse = {id(parameter) for parameter in sparse}
        self.dense = [parameter for parameter in parameters if id(parameter) not in self._sparse]
        self._tables_of = [parameter for parameter in parameters if id(parameter) in self._sparse]
        self._index = {id(parameter): k for k, parameter in enumerate(parameters)}
        self._uses = Uses()
        self.ways_out = "use the ops of fastmtl.surgery.functional for it, or leave it out of `shared`"
        self.per_task = PER_TASK_PASSES
        self.in_graph: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter
        self._totals: set[torch.dtype] | None = None

    @contextmanager
    def armed(self, device: torch.device) -> Iterator[None]:
        """Take gradients inside the block, which contains a forward and its backward."""
        self.arm(device)
        try:
            yield
        finally:
            self.disarm()

    def arm(self, device: torch.device) -> None:
        """Take gradients until `disarm`."""
        if self.anchor.device != device:
            self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.active, self.in_backward, self.used = True, False, False

    def disarm(self) -> None:
        self.active = self.in_backward = False
        self._uses.forget()

    def check_active(self) -> None:
        """Raise RuntimeError if a backward runs outside `armed`; its forward has run inside.

        Raises UserError in a backward with create_graph=True inside a forward.
        """
        if not self.active:
            raise RuntimeError(NOT_ARMED)
        if self.used and not self.in_backward and torch.is_grad_enabled():
            raise UserError(
                "one pass for all tasks has no second derivatives (torch.autograd.grad with create_graph=True inside "
                f"the losses): use {self.per_task}, or leave task_grads out"
            )

    def wants(self, parameter: nn.Parameter | None) -> bool:
        """Return True if the sink takes gradients of the parameter, which is shared and trained."""
        return parameter is not None and parameter.requires_grad and id(parameter) in self._index

    def takes(self, parameter: nn.Parameter | None) -> bool:
        """Return True if a backward gives the parameter's gradients to the sink now."""
        return self._totals is None and self.wants(parameter)

    @contextmanager
    def totals(self) -> Iterator[set[torch.dtype]]:
        """Let backwards inside the block give autograd the plain gradients of all rows.

        The sink takes nothing. Rows of no task count, too. The sum over rows is computed task by
        task: if only the rows of one task carry a gradient, it has the same bits as that task's.
        Yields a set that receives the dtypes of the layers' output gradients.
        """
        self._totals = set()
        try:
            yield self._totals
        finally:
            self._totals = None

    def is_sparse(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._sparse

    def expect(self, *parameters: nn.Parameter | None) -> None:
        """Count one use of these parameters in a forward; its backward will deliver gradients."""
        self.used = True
        self._uses.expect(*parameters)

    def forward_done(self, *, last: bool = False) -> None:
        """End the count of uses before backward, where checkpointing runs forwards once more.

        last: True if the step's last backward follows.
        """
        self._uses.counting, self.in_backward = False, True

    def backward(
        self,
        terms: Sequence[Term],
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        names: Mapping[int, str],
        *,
        retain_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        """Run the backward of a loss, in which shared layers pass task gradients to this sink.

        terms: pairs of a scalar and its factor, which add up to the loss. Returns the gradients of
        `own`. names: names of parameters by id, for messages. retain_graph: True if the graph is
        needed again. Raises UserError if a gradient of `shared` bypasses the sink.
        """
        # Layers that use the sink give autograd no gradient of `shared`; any would be lost.
        tensors = [self.in_graph(parameter) for parameter in shared]
        names = dict(names) | {id(tensor): names[id(p)] for tensor, p in zip(tensors, shared, strict=True)}
        anchor, *rest = differentiate(terms, [self.anchor, *own, *tensors], names, retain_graph=retain_graph)
        if anchor is None and not self.used:
            raise UserError(
                "loss_fn takes task_grads but the model does not use it: pass it to the layers, embedding included, or "
                "leave it out for one backward pass per task"
            )
        for parameter, gradient in zip(shared, rest[len(own) :], strict=True):
            if gradient is not None:
                raise UserError(
                    f"shared parameter {names[id(parameter)]} is used by an op that does not write into task_grads: "
                    f"{self.ways_out}"
                )
        return rest[: len(own)]

    def deliver(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """Take task gradients [T, *shape] of a dense parameter, or sum them if it is not shared.

        Returns the parameter's gradient for autograd; None where autograd gets nothing.
        """
        if not self.takes(parameter):
            return gradients.sum(0)
        self.check_active()
        return self.take(parameter, gradients)

    @abstractmethod
    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """Take task gradients [T, *shape] of a shared dense parameter. Returns as `deliver`."""

    def deliver_tasks(self, parameter: nn.Parameter, gradients: Mapping[int, Tensor]) -> Tensor | None:
        """Take the gradients of some tasks, by the task's number; those of the others are zero.

        -1 stands for rows of no task, which count only in plain gradients. Returns the parameter's
        gradient for autograd, as `deliver`.
        """
        if not self.takes(parameter):
            return torch.stack(list(gradients.values())).sum(0)
        self.check_active()
        return self.take_tasks(parameter, gradients)

    def take_tasks(self, parameter: nn.Parameter, gradients: Mapping[int, Tensor]) -> Tensor | None:
        """Take some tasks' gradients of a shared dense parameter, as `deliver_tasks` says."""
        like = next(iter(gradients.values()))
        every = like.new_zeros(self.num_tasks, *like.shape)
        for task, gradient in gradients.items():
            if task >= 0:
                every[task] = gradient
        return self.take(parameter, every)

    def products(self, parameter: nn.Parameter, dy: Tensor, product: Product, segments: Segments) -> Tensor | None:
        """Take a dense parameter's T gradients and return its gradient for autograd, as `deliver`.

        product(dy, rows) computes the gradient of one task from the rows of that task.
        """
        if self._totals is not None:
            self._totals.add(dy.dtype)
            return sum_of_products(dy, product, segments)
        if not self.wants(parameter):
            return product(dy, segments.all_rows())
        self.check_active()
        return self.take_products(parameter, dy, product, segments)

    def take_products(self, parameter: nn.Parameter, dy: Tensor, product: Product, segments: Segments) -> Tensor | None:
        """Take the T gradients of a shared dense parameter, as `products` says."""
        return self.take(parameter, torch.stack([product(dy, rows) for rows in segments.rows()]))

    def linear(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        dy: Tensor,
        x: Tensor,
        segments: Segments,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take the task gradients of a Linear; return the gradients of weight and bias for
        autograd.

        dy [N, out], rows of any stride; x [N, in]. needed: True where autograd asks for the
        weight's and the bias's gradient.
        """
        self.check_active()
        dw = self.products(weight, dy, lambda dy, rows: dy[rows].t() @ x[rows], segments) if needed[0] else None
        db = None
        if bias is not None and needed[1]:
            db = self.products(bias, dy, lambda dy, rows: dy[rows].sum(0), segments)
        return dw, db

    def linears(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter],
        rows: Tensor,
        x: Tensor,
        segments: Segments,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Take the task gradients of k Linears with one input.

        rows [N, k out]: the output gradients side by side. x [N, in]. needed: 2 k flags, True where
        autograd asks for the gradient. Returns the gradients for autograd: k weights, then k
        biases.
        """
        number = len(weights)
        found = [
            self.linear(weight, bias, dy, x, segments, (needed[i], needed[number + i]))
            for i, (weight, bias, dy) in enumerate(zip(weights, biases, rows.chunk(number, dim=1), strict=True))
        ]
        return [dw for dw, _ in found] + [db for _, db in found]

    def deliver_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        """Take `rows` [N, d], the gradients of the table rows `ids` [N] that N tokens have read.

        Returns the table's gradient for autograd, in float32 or wider; None where autograd gets
        nothing. token_offsets: task t has the tokens token_offsets[t]:token_offsets[t + 1].
        """
        self.check_active()
        if not self.takes(table):
            return table_gradient(table, ids, rows)
        return self.take_rows(table, ids, rows, token_offsets)

    def take_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        """Take the row gradients of a shared table. Arguments and result: see `deliver_rows`."""
        sizes = [stop - start for start, stop in pairwise(token_offsets)]
        sizes.append(len(ids) - token_offsets[-1])  # tokens of no task, at the end
        pairs = list(zip(ids.split(sizes)[:-1], rows.split(sizes)[:-1], strict=True))
        return (self.sparse_table if self.is_sparse(table) else self.dense_table)(table, pairs)

    def sparse_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Take one pair (ids [n], rows [n, d]) per task, for a table in `sparse`.

        Returns the table's gradient for autograd, as `deliver_rows`. A sink without compact rows
        treats the table as a dense one.
        """
        return self.dense_table(table, pairs)

    def dense_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Take one pair (ids [n], rows [n, d]) per task, for a table that is not in `sparse`.

        Returns the table's gradient for autograd, as `deliver_rows`.
        """
        return self.take(table, torch.stack([sum_of_rows(table, *pair) for pair in pairs]))

    def clear(self) -> None:
        """Drop the gradients taken so far, before the next step; buffers stay allocated."""
        self._uses.clear()

    def nbytes(self) -> int:
        """Return the bytes of the task gradients held now, and of the largest temporary piece."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold task gradients now."""
        return []
