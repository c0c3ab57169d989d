"""Evaluation, predictions and summaries by task type."""

from fastmtl.inference.types.choice import CHOICE
from fastmtl.inference.types.multilabel import MULTILABEL
from fastmtl.inference.types.ranking import RANKING
from fastmtl.inference.types.single import SINGLE
from fastmtl.inference.types.span import SPAN
from fastmtl.inference.types.spec import InferenceType
from fastmtl.inference.types.tokens import TOKENS

INFERENCE_TYPES: dict[str, InferenceType] = {
    "classification": SINGLE,
    "binary": SINGLE,
    "regression": SINGLE,
    "tokens": TOKENS,
    "span": SPAN,
    "choice": CHOICE,
    "ranking": RANKING,
    "multilabel": MULTILABEL,
}

__all__ = ["INFERENCE_TYPES", "InferenceType"]
