"""Protocol of a gradient method: from the Gramian of task gradients to one weight per task."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

Reduction = Literal["sum", "mean"]


class Method(Protocol):
    """Method that returns the task weights of one step after another, and may keep state.

    by_rank: True if each rank may solve for itself (`reduce: local`). by_tensor: True if the method
    solves on the device, reads no number on the host and keeps its state at fixed addresses. It can
    then run inside backward for each tensor (`scope: tensor`), and in a CUDA graph.
    """

    by_rank: bool
    by_tensor: bool

    def weights(self, gramian: Tensor, order: Tensor) -> Tensor:
        """Return the weights [T] of the task gradients.

        gramian: float32 [T, T]. A Gramian that is not finite must not change the method's state,
        since its step is skipped. order: int64 [T, T] on the Gramian's device, from `draw_order`.
        """
        ...

    def of_tensor(self, index: int) -> Method:
        """Return the method for one parameter tensor, with a state of its own (`by_tensor`)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the method keeps from step to step, as values for JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
