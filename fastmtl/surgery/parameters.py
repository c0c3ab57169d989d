"""Lists of parameters that users give."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastmtl.errors import UserError, quoted


def check_parameters(argument: str, given: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return each parameter once, in the order given. Raises UserError, naming `argument`, for what is no parameter."""
    way_out = f"give parameters, for example {argument}=model.encoder.parameters()"
    if isinstance(given, Tensor | nn.Module | str) or not isinstance(given, Iterable):
        raise UserError(f"{argument} is of type {type(given).__name__}, not a list: {way_out}")
    found = {}
    for one in given:
        if isinstance(one, tuple):
            raise UserError(f"{argument} has pairs of names and parameters: use parameters() for named_parameters()")
        if not isinstance(one, Tensor):
            raise UserError(f"{argument} has {quoted(one)}, which is no parameter: {way_out}")
        found[id(one)] = one
    return list(found.values())
