"""Uses of each weight in a forward, and its gradients until the last use has delivered."""

from __future__ import annotations

from torch import Tensor, nn


class Uses:
    """Counter of uses in forward, and sum of one weight's task gradients over its uses.

    Inner products need the whole task gradient, so the gradients of a weight that is used twice are
    added first.

    held: incomplete sums by parameter id; a use that the loss does not depend on never delivers.
    left: uses that have not delivered, by parameter id.
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
        """Count one delivery; return True if it was the last one."""
        self.left[key] = self.left.get(key, 0) - 1
        return self.left[key] == 0

    def complete(self, key: int, gradients: Tensor) -> Tensor | None:
        """Add one use's gradients; return the sum with the last use, None before."""
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
