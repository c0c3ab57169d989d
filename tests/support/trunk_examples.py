"""An example for the tests of one pass: a trunk in random small sizes, and a batch for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Features = Callable[[nn.Module, Inputs], Tensor]


@dataclasses.dataclass(frozen=True)
class Example:
    """A trunk and its batch.

    inputs: tensors with B in dimension 0. features: (trunk, inputs) -> [B, width], to which every
    position of a row contributes. draws: True if modules that run once per task draw random
    numbers, which then differ from those of one call for all rows.
    """

    trunk: nn.Module
    inputs: Inputs
    features: Features
    width: int
    draws: bool = False

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    def double(self) -> Example:
        """Return this example in float64; the trunk is converted in place."""
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in self.inputs.items()}
        return dataclasses.replace(self, trunk=self.trunk.double(), inputs=inputs)


class Draw:
    """Random sizes of an encoder and its batch.

    Head sizes are even, as rotary embeddings require. rows: B, drawn by default.
    """

    def __init__(self, seed: int, *, rows: int | None = None, dropout: float = 0.2) -> None:
        self.random = np.random.default_rng(seed)
        self.heads = self.one_of(2, 4)
        self.hidden = self.heads * self.one_of(2, 4, 6)
        self.inner = self.one_of(6, 10, 15)
        self.layers = self.one_of(1, 2)
        self.vocab = self.one_of(23, 40, 2100)  # a large table has compact rows in J
        self.rows = self.one_of(7, 9, 10) if rows is None else rows
        self.tokens = self.one_of(4, 5, 7)
        self.dropout = dropout

    def one_of(self, *values: Any) -> Any:
        return values[self.random.integers(len(values))]

    def sizes(self) -> dict[str, Any]:
        """Return arguments that most configurations share."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": 12,
            "pad_token_id": 0,
        }

    def dropouts(self) -> dict[str, Any]:
        return {"hidden_dropout_prob": self.dropout, "attention_probs_dropout_prob": self.dropout}

    def tokens_and_mask(self) -> Inputs:
        """Return ids and an attention mask [B, L], padded with 0 on the right."""
        ids = torch.from_numpy(self.random.integers(4, self.vocab, (self.rows, self.tokens)))
        lengths = torch.from_numpy(self.random.integers(1, self.tokens + 1, self.rows))
        lengths[0] = self.tokens
        mask = (torch.arange(self.tokens) < lengths[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    def types(self) -> Inputs:
        """Return token types [B, L]."""
        return {"token_type_ids": torch.from_numpy(self.random.integers(0, 2, (self.rows, self.tokens)))}

    def example(self, trunk: nn.Module, inputs: Inputs, features: Features, width: int = 0, **more: Any) -> Example:
        """Return the example. Every parameter moves, so that no gradient is zero at the start."""
        generator = torch.Generator().manual_seed(int(self.random.integers(1 << 31)))
        with torch.no_grad():
            for parameter in trunk.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return Example(trunk, inputs, features, width or self.hidden, **more)
