"""Sizes of encoders and lengths of texts for all benchmarks.

This module imports torch and numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

SEED = 1
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Token counts of texts with [CLS] and [SEP] at these quantiles, for three tasks: pairs of
# questions, pairs of sentences, sentences of reviews. The mean counts are 30, 28 and 25; the
# longest of 32 texts has two to three times as many.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
LENGTHS = ((10, 16, 21, 27, 35, 46, 60, 96), (9, 14, 18, 24, 33, 46, 62, 100), (4, 9, 16, 23, 33, 40, 48, 64))


@dataclass(frozen=True)
class Shape:
    """The size of an encoder, and the number of sequences of each task in a step.

    rows: the number of sequences. vocabulary, positions: rows of the word and position tables; an
    encoder without the latter has texts of at most so many tokens.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    rows: int
    vocabulary: int = 30522
    positions: int = 512

    @property
    def parameters(self) -> int:
        """The number of the encoder's parameters, of a BERT of this size.

        The encoder has three tables and a LayerNorm, and in each layer six linear maps and two
        LayerNorms.
        """
        d, wide = self.hidden, self.intermediate
        layer = 4 * (d * d + d) + (d * wide + wide) + (wide * d + d) + 4 * d
        return (self.vocabulary + self.positions + 2) * d + 2 * d + self.layers * layer


SHAPES = {
    "minilm": Shape("minilm", hidden=384, layers=6, heads=12, intermediate=1536, rows=32),
    "bert-base": Shape("bert-base", hidden=768, layers=12, heads=12, intermediate=3072, rows=8),
    # For trying a command in a moment; its times mean nothing.
    "tiny": Shape("tiny", hidden=32, layers=2, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128),
}
# Shapes for `bench step`, each with the encoder's family.
STEP_SHAPES = {
    **{name: (shape, "bert") for name, shape in SHAPES.items()},
    "roberta-base": (replace(SHAPES["bert-base"], name="roberta-base", vocabulary=50265, positions=514), "roberta"),
    "modernbert-base": (
        Shape("modernbert-base", 768, 22, heads=12, intermediate=1152, rows=8, vocabulary=50368, positions=8192),
        "modernbert",
    ),
}


@dataclass(frozen=True)
class Size:
    """The settings of a workload.

    tokens: number in the whole step, split equally between tasks; None: each task has shape.rows
    texts. device: "cpu" or "cuda". precision: of weights and activations, a key of PRECISIONS.
    dropout: the probability for hidden states and attention probabilities. family: the encoder's
    model_type, one of CONFIGS in configs.py.
    """

    shape: Shape
    tasks: int = 3
    tokens: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    dropout: float = 0.0
    family: str = "bert"


def lengths_of(shape: Shape, tasks: int, tokens: int | None = None) -> list[np.ndarray]:
    """Return the token counts of each task's texts, one int64 [texts] array per task.

    tokens: number for all tasks together, split equally; None: each task has shape.rows texts.
    """
    return [
        lengths_of_rows(task, shape.rows)
        if tokens is None
        else lengths_of_tokens(task, tokens // tasks + (task < tokens % tasks))
        for task in range(tasks)
    ]


def lengths_of_rows(task: int, rows: int) -> np.ndarray:
    """Return the token counts of `rows` texts, int64 [rows].

    They are taken at evenly spaced quantiles, so that even a few texts include long ones.
    """
    found = np.interp((np.arange(rows) + 0.5) / rows, QUANTILES, LENGTHS[task % len(LENGTHS)])
    return np.rint(found).astype(np.int64)


def lengths_of_tokens(task: int, tokens: int) -> np.ndarray:
    """Return the token counts of texts with `tokens` tokens in all, int64 [texts].

    The mean length decides the number of texts. Then each length is changed slightly to reach the
    sum.
    """
    mean = lengths_of_rows(task, 1000).mean()
    lengths = lengths_of_rows(task, max(round(tokens / mean), 1))
    missing = tokens - int(lengths.sum())
    lengths += missing // len(lengths)
    lengths[: missing % len(lengths)] += 1
    return lengths
