"""Count of the uses of each weight in a forward, and its gradients until the last one is there."""

from __future__ import annotations

from torch import Tensor, nn


class Uses:
    """Counter of each parameter's uses in a forward, and sums of its task gradients over the uses.

    A Gramian needs whole task gradients. So if a weight is used twice, the gradients of both uses
    are added before.

    held: incomplete sums by parameter id; a use that the loss does not depend on never delivers.
    left: by parameter id, the number of uses whose gradients have not been delivered.
    """

    def __init__(self) -> None:
        self.counting = False
        self.held: dict[int, Tensor] = {}
        self.left: dict[int, int] = {}

    def expect(self, *parameters: nn.Parameter | None) -> None:
        if self.counting:
            for parameter in parameters:
                self.left[id(parameter)] = self.left.get(id(parameter), 0) + 1

    def count_delivery(self, key: int) -> bool:
        """Count one delivery for the parameter with id `key`; return True if it was the last."""
        self.left[key] = self.left.get(key, 0) - 1
        return self.left[key] == 0

    def complete(self, key: int, gradients: Tensor) -> Tensor | None:
        """Add the gradients of one use; return their sum if it was the last use, else None."""
        if key in self.held:
            gradients = gradients + self.held.pop(key)
        self.left[key] -= 1
        if self.left[key] > 0:
            self.held[key] = gradients
            return None
        return gradients

    def forget(self) -> None:
        """Stop counting after a forward and backward; incomplete sums stay until `clear`."""
        self.counting = False
        self.left.clear()

    def clear(self) -> None:
        self.held.clear()
