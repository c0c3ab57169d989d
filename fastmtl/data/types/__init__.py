"""Reading and tokenisation by task type."""

from fastmtl.data.types.single import SINGLE
from fastmtl.data.types.spec import DataType

DATA_TYPES: dict[str, DataType] = {"classification": SINGLE, "binary": SINGLE, "regression": SINGLE}

__all__ = ["DATA_TYPES", "DataType"]
