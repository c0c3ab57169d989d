"""Reading and tokenisation by task type."""

from fastmtl.data.types.choice import CHOICE
from fastmtl.data.types.ranking import RANKING
from fastmtl.data.types.single import SINGLE
from fastmtl.data.types.spec import DataType

DATA_TYPES: dict[str, DataType] = {
    "classification": SINGLE,
    "binary": SINGLE,
    "regression": SINGLE,
    "choice": CHOICE,
    "ranking": RANKING,
}

__all__ = ["DATA_TYPES", "DataType"]
