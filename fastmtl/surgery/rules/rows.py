"""Check of a layer's input against the segments of its rows."""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery.segments import Segments


def check_rows(op: str, x: Tensor, dims: int, segments: Segments) -> None:
    """Raise UserError for an x of other dimensions, or with fewer rows than the segments have."""
    if x.dim() != dims:
        wanted, way = ("[N]", "ids.flatten()") if dims == 1 else ("[N, width]", "x.flatten(0, -2)")
        raise UserError(
            f"functional.{op}: an input of shape {tuple(x.shape)} where {wanted} is needed, the rows of all tasks in "
            f"one dimension: give it {way}, and Segments that count these rows"
        )
    if segments.host[-1] > len(x):
        raise UserError(
            f"functional.{op}: the segments end at row {segments.host[-1]}, but the input has {len(x)} rows: Segments "
            "count the rows of what the layer is given (tokens, not texts, where a row is a token)"
        )
