"""Operations on the parameters of several modules at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn


class Owner(nn.Module):
    """A module whose parameters `within` makes readable."""

    def forward(self, x: Tensor, *, call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(x)


def within(owners: Iterable[Owner], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """call(x), an operation on the parameters of several modules at once.

    Under ZeRO 3 a parameter has storage only while its own module runs. So each owner runs around the next, the rows
    going in and out, and the last around `call`, which may then read the parameters of all.
    """
    for owner in owners:
        call = partial(owner, call=call)
    return call(x)
