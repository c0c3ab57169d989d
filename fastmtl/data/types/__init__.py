"""Reading and tokenisation by task type."""

from fastmtl.config import TaskConfig
from fastmtl.data.types.choice import CHOICE
from fastmtl.data.types.ranking import RANKING
from fastmtl.data.types.single import SINGLE
from fastmtl.data.types.span import SPAN
from fastmtl.data.types.spec import DataType
from fastmtl.data.types.tokens import TOKENS

DATA_TYPES: dict[str, DataType] = {
    "classification": SINGLE,
    "binary": SINGLE,
    "regression": SINGLE,
    "tokens": TOKENS,
    "span": SPAN,
    "choice": CHOICE,
    "ranking": RANKING,
    "multilabel": SINGLE,
}


def encoding_key(task: TaskConfig) -> tuple[str, str]:
    """Return a value that is equal for tasks which tokenise the same texts alike."""
    kind = DATA_TYPES[task.type]
    return kind.encode.__module__, repr(kind.settings(task))


__all__ = ["DATA_TYPES", "DataType", "encoding_key"]
