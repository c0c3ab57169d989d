"""Outputs, losses and predictions of the task types whose head scores units, by name.

heads/outputs.py has those of the other types, with one output per row.
"""

from fastmtl.model.types.choice import CHOICE
from fastmtl.model.types.ranking import RANKING
from fastmtl.model.types.span import SPAN
from fastmtl.model.types.spec import UnitType
from fastmtl.model.types.tokens import TOKENS

UNIT_TYPES: dict[str, UnitType] = {"tokens": TOKENS, "span": SPAN, "choice": CHOICE, "ranking": RANKING}

__all__ = ["UNIT_TYPES", "UnitType"]
