"""The task types by name. A type is one file here, and one of the same name in data/types,
model/types and inference/types.
"""

from fastmtl.config.types.binary import BINARY
from fastmtl.config.types.choice import CHOICE, ChoiceConfig
from fastmtl.config.types.classification import CLASSIFICATION
from fastmtl.config.types.multilabel import MULTILABEL, MultilabelConfig
from fastmtl.config.types.ranking import RANKING, RankingConfig
from fastmtl.config.types.regression import REGRESSION
from fastmtl.config.types.span import SPAN, SpanConfig
from fastmtl.config.types.spec import TypeSpec
from fastmtl.config.types.tokens import TOKENS, TokensConfig

TYPES: dict[str, TypeSpec] = {
    "classification": CLASSIFICATION,
    "binary": BINARY,
    "regression": REGRESSION,
    "tokens": TOKENS,
    "span": SPAN,
    "multilabel": MULTILABEL,
    "choice": CHOICE,
    "ranking": RANKING,
}

__all__ = ["TYPES", "ChoiceConfig", "MultilabelConfig", "RankingConfig", "SpanConfig", "TokensConfig", "TypeSpec"]
