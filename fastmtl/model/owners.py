"""Operations that read the parameters of several modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn


class Owner(nn.Module):
    """Module whose parameters an operation in `within` may read."""

    def forward(self, x: Tensor, *, call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(x)


def within(owners: Iterable[Owner], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Return call(x), where `call` reads the parameters of all owners.

    Under ZeRO 3 a parameter has storage only while its own module runs. The forwards of the owners
    are therefore nested: each calls the next with x, and the last one calls `call`.
    """
    for owner in owners:
        call = partial(owner, call=call)
    return call(x)
