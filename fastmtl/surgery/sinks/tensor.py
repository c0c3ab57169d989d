"""`scope: tensor`: the sink that merges each parameter's T gradients during backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.jacobian.compact_rows import coalesce, rows_gramian, weighted_table
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.ranks.alone import Alone
from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels import combine, gramian

# (index of a parameter, its Gramian [T, T]) -> weights [T]
Solve = Callable[[int, Tensor], Tensor]


class TensorSink(Sink):
    """Sink that gives autograd the merged gradient of each parameter.

    A parameter's T gradients are complete when all of its uses in the forward have delivered. Its
    Gramian, weights and merged gradient are then computed at once, inside backward.

    solve: returns the weights for a parameter's Gramian; set it before backward. ranks: the ranks
    whose gradients add up.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        ranks: Ranks | None = None,
        solve: Solve | None = None,
    ) -> None:
        super().__init__(parameters, num_tasks, sparse=sparse)
        self.solve = solve
        self._ranks = Alone() if ranks is None else ranks
        self._largest = 0

    def arm(self, device: torch.device) -> None:
        super().arm(device)
        self._uses.counting = True

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """Take task gradients [T, *shape] of a dense parameter.

        Returns the merged gradient when the parameter's last use delivers, None before.
        """
        self._largest = max(self._largest, gradients.nbytes)
        complete = self._uses.complete(id(parameter), gradients)
        if complete is None:
            return None
        share = self._ranks.scatter(complete.reshape(self.num_tasks, -1)).to(torch.float32)
        weights = self._weights(parameter, self._ranks.total(gramian(share)))
        return combine([[gradient] for gradient in complete.unbind()], weights)[0]

    def sparse_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        shape, like = whole_shape(table), pairs[0][1]
        parts = [[pair] for pair in pairs]
        (tasks,) = self._ranks.gather_rows([coalesce(parts, shape, like)], [shape])
        weights = self._weights(table, rows_gramian(tasks))
        return weighted_table(shape, parts, weights).to(like.dtype)

    def check_merged(self, names: Mapping[int, str]) -> None:
        """Raise UserError after backward if the loss depends on only some uses of a parameter."""
        for key in self._uses.held:
            raise UserError(
                f"scope='tensor': {names[key]} is used more than once and the loss depends on some of the uses only, "
                "so its gradient would be lost; use scope='global'"
            )

    def clear(self) -> None:
        super().clear()
        self._largest = 0

    def nbytes(self) -> int:
        return self._largest + super().nbytes()

    def tensors(self) -> list[Tensor]:
        return list(self._uses.held.values())

    def _weights(self, parameter: nn.Parameter, gram: Tensor) -> Tensor:
        assert self.solve is not None, "solve is set before backward"
        return self.solve(self._index[id(parameter)], gram)
