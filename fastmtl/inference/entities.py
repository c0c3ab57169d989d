"""Entities in sequences of tags, and their precision, recall and F1, as in seqeval 1.2.2.

seqeval's default mode (`default`) accepts any sequence: an entity begins with B, S, or any tag
after O, after E or S, or after a tag of another type. Its mode `strict` accepts only entities as
the scheme defines them, and leaves broken ones out.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.config.types.tokens import split_tag

Mode = Literal["default", "strict"]


class Entities:
    """The entities of tagged sentences.

    kinds: int64 [N], the number of each entity's type in `types`. starts, ends: int64 [N], its
    first and its last word, counted over all sentences; N entities in the words' order.
    """

    def __init__(self, task: TaskConfig, tags: np.ndarray, offsets: np.ndarray, mode: Mode = "default") -> None:
        """Find the entities.

        tags: int64 [W], those of all words. offsets: int64 [n + 1]; sentence i has the words
        offsets[i] to offsets[i + 1] - 1.
        """
        split = [split_tag(name) for name in task.label_names or ()]
        self.types = entity_types(task)
        numbers = {name: number for number, name in enumerate(self.types)}
        prefix = np.array([prefix for prefix, _ in split])[tags]
        kind = np.array([numbers.get(name, -1) for _, name in split])[tags]

        # An O before each sentence and after the last one, as in seqeval.
        at = np.arange(len(tags)) + np.repeat(np.arange(1, len(offsets)), np.diff(offsets))
        size = len(tags) + len(offsets)
        prefixes, kinds, words = np.full(size, "O"), np.full(size, -1), np.full(size, -1)
        prefixes[at], kinds[at], words[at] = prefix, kind, np.arange(len(tags))
        before, here = prefixes[:-1], prefixes[1:]
        same = kinds[:-1] == kinds[1:]
        if mode == "default":
            inside = (here != "O") & (before != "O")
            goes_on = inside & same & np.isin(here, ["I", "E"]) & np.isin(before, ["B", "I"])
            starts = (here != "O") & ~goes_on
            begins = np.flatnonzero(starts) + 1
            ends = np.flatnonzero((before != "O") & ~goes_on)
        else:
            starts = np.isin(here, ["B", "S"])
            goes_on = same & np.isin(here, ["I", "E"]) & np.isin(before, ["B", "I"])
            begins = np.flatnonzero(starts) + 1
            stops = np.flatnonzero(~goes_on) + 1  # the first position after each run
            ends = stops[np.searchsorted(stops, begins, side="right")] - 1 if len(begins) else begins
            if task.tokens.scheme == "iobes":
                whole = np.isin(prefixes[ends], ["E", "S"])
                begins, ends = begins[whole], ends[whole]
        self.kinds, self.starts, self.ends = kinds[begins], words[begins], words[ends]

    def keys(self) -> np.ndarray:
        """Return type, first and last word of each entity, int64 [N, 3]."""
        return np.stack([self.kinds, self.starts, self.ends], axis=1)


def entity_types(task: TaskConfig) -> list[str]:
    """Return the entity types of a task's tags, in the order of the tags."""
    return list(dict.fromkeys(kind for _, kind in map(split_tag, task.label_names or ()) if kind))


def entity_counts(gold: Entities, predicted: Entities) -> np.ndarray:
    """Return int64 [types, 3]: how many are right, predicted and in the labels, of each type."""
    size = len(gold.types)
    right = {tuple(key) for key in gold.keys().tolist()} & {tuple(key) for key in predicted.keys().tolist()}
    kinds = (np.array([kind for kind, *_ in right], dtype=np.int64), predicted.kinds, gold.kinds)
    return np.stack([np.bincount(found, minlength=size) for found in kinds], axis=1)


def precision_recall_f1(right: int, predicted: int, labelled: int) -> tuple[float, float, float]:
    """Return the three metrics, each 0 where it would be 0 / 0."""
    precision = right / predicted if predicted else 0.0
    recall = right / labelled if labelled else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if right else 0.0
