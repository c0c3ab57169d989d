"""The base class of a recipe's sections, and the types of its numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

MOST = 2**31 - 1  # the limit of sizes and counts: products of two fit 64 bits


def _whole(value: Any) -> Any:
    """Return a whole float (5e8, 16.0) as an integer, any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any) -> Any:
    whole = _whole(value)
    if isinstance(whole, int) and whole > MOST:
        raise ValueError(f"Input should be less than or equal to {MOST}")
    return whole


Whole = Annotated[int, BeforeValidator(_whole)]
Int = Annotated[int, BeforeValidator(_count)]


class Section(BaseModel):
    """A part of a recipe. Types are strict: neither text nor a boolean counts as a number."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, strict=True)
