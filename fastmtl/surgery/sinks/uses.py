"""Uses of a weight in one forward, and the gradients of those that have come in backward."""

from __future__ import annotations

from torch import Tensor, nn


class Uses:
    """Counts uses in forward and adds up one weight's task gradients until the last use has delivered.

    Inner products of task gradients are those of the whole gradient, so a weight that is used twice has to add up
    first. held: incomplete sums by the parameter's id; a use that the loss does not depend on never delivers.
    """

    def __init__(self) -> None:
        self.counting = False
        self.held: dict[int, Tensor] = {}
        self.left: dict[int, int] = {}

    def expect(self, *parameters: nn.Parameter | None) -> None:
        if self.counting:
            for parameter in parameters:
                self.left[id(parameter)] = self.left.get(id(parameter), 0) + 1

    def one_less(self, key: int) -> bool:
        """Note that a use has delivered; return whether it was the last one."""
        self.left[key] = self.left.get(key, 0) - 1
        return self.left[key] == 0

    def complete(self, key: int, gradients: Tensor) -> Tensor | None:
        """Add one use's gradients; return the sum over all uses with the last of them, None before."""
        if key in self.held:
            gradients = gradients + self.held.pop(key)
        self.left[key] -= 1
        if self.left[key] > 0:
            self.held[key] = gradients
            return None
        return gradients

    def forget(self) -> None:
        """End the counting of one forward and backward. Incomplete sums stay until `clear`."""
        self.counting = False
        self.left.clear()

    def clear(self) -> None:
        self.held.clear()
