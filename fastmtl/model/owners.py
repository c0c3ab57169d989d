"""Calls of operations that read the parameters of several modules, in a way that suits ZeRO 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn


class Owner(nn.Module):
    """Module with parameters for an operation called by `within`."""

    def forward(self, x: Tensor, *, call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(x)


def within(owners: Iterable[Owner], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Return call(x). While `call` runs it may read the parameters of all owners.

    Under ZeRO 3 a parameter has storage only during the forward of its own module. The forwards of
    the owners are therefore nested: each one calls the next, and the innermost runs call(x).
    """
    for owner in owners:
        call = partial(owner, call=call)
    return call(x)
