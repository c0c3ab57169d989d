"""Easy data augmentation (Wei & Zou 2019), balanced by class.

The balancing follows "BERT: A Master of All Trades or Jack of None?": every class gets new rows
until it has as many rows as the largest class. Each new row is a changed copy of a row of its
class; the rows of the class are copied in turn. A copy is changed in four ways: words are replaced
by synonyms, synonyms are inserted, words are swapped, words are deleted. The recipe gives a share
for each way. Each of the first three ways makes max(1, share * words) changes, or none if its share
is 0. The fourth share is the probability of deleting a word. Both texts of a pair are changed.
Scikit-learn's stop words and words that are not in WordNet have no synonyms.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from fastmtl.config import AugmentConfig
from fastmtl.data.rows import Rows
from fastmtl.data.wordnet import WordNet, find_wordnet
from fastmtl.files.user_path import cache_path

CACHE_VERSION = 1
_CORE = re.compile(r"^(\W*)([\w'-]*\w)(\W*)$")
Made = list[tuple[int, str, str | None]]  # new rows: number of the copied row, text, second text


def augment(rows: Rows, config: AugmentConfig, seed: int, cache_dir: str | Path) -> Rows:
    """Return the rows, followed by the new rows.

    The new rows that are copies of the row with the id `a` have the ids `a+1`, `a+2`, ...

    The result depends only on the rows, the settings, WordNet and the seed. It is cached in
    `cache_dir` if that is writable. Raises UserError if WordNet is needed and not installed.
    """
    assert rows.labels is not None  # training rows have labels
    wordnet = find_wordnet(config.wordnet) if config.uses_synonyms else None
    pairs = None if rows.pair_texts is None else list(rows.pair_texts)
    settings = [CACHE_VERSION, config.model_dump(exclude={"wordnet"}), seed, wordnet and wordnet.version]
    key = hashlib.sha256(json.dumps([settings, list(rows.texts), pairs, rows.labels.tolist()]).encode()).hexdigest()
    entry = cache_path(cache_dir) / f"augmented-{key[:32]}.json"
    made = _load(entry)
    if made is None:
        made = _make(rows, config, seed, wordnet)
        _store(entry, made)
    return _with(rows, made)


def missing_rows(labels: np.ndarray, seed: int) -> list[int]:
    """Return the number of the row that each new row copies.

    labels: int [n]. Every class gets as many rows as the largest class. The rows of a class are
    copied in shuffled order, as many times as necessary.
    """
    classes, counts = np.unique(labels, return_counts=True)
    chosen: list[int] = []
    for number, (label, count) in enumerate(zip(classes, counts, strict=True)):
        order = np.random.default_rng([seed, number]).permutation(np.flatnonzero(labels == label))
        chosen += np.resize(order, counts.max() - count).tolist()
    return chosen


def change(text: str, config: AugmentConfig, wordnet: WordNet | None, random: np.random.Generator) -> str:
    """Return `text` with random changes, in the amounts that `config` gives."""
    words = text.split()
    for _ in range(_number(config.synonyms, words)):
        _replace(words, wordnet, random)
    for _ in range(_number(config.insertions, words)):
        _insert(words, wordnet, random)
    for _ in range(_number(config.swaps, words)):
        one, other = random.integers(0, len(words), 2)
        words[one], words[other] = words[other], words[one]
    kept = [word for word, draw in zip(words, random.random(len(words)), strict=True) if draw >= config.deletions]
    return " ".join(kept or [words[random.integers(0, len(words))]])


def _number(share: float, words: list[str]) -> int:
    return max(1, int(share * len(words))) if share else 0


def _replace(words: list[str], wordnet: WordNet | None, random: np.random.Generator) -> None:
    for at in random.permutation(len(words)):
        before, found, after = _synonyms(words[at], wordnet)
        if found:
            words[at] = f"{before}{found[random.integers(0, len(found))]}{after}"
            return


def _insert(words: list[str], wordnet: WordNet | None, random: np.random.Generator) -> None:
    for at in random.permutation(len(words)):
        _, found, _ = _synonyms(words[at], wordnet)
        if found:
            words.insert(int(random.integers(0, len(words) + 1)), found[random.integers(0, len(found))])
            return


def _synonyms(word: str, wordnet: WordNet | None) -> tuple[str, tuple[str, ...], str]:
    """Return the punctuation before a word, the word's synonyms and the punctuation after it."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    assert wordnet is not None
    found = _CORE.match(word)
    if found is None or found[2].lower() in ENGLISH_STOP_WORDS:
        return "", (), ""
    return found[1], wordnet.synonyms(found[2].lower()), found[3]


def _make(rows: Rows, config: AugmentConfig, seed: int, wordnet: WordNet | None) -> Made:
    assert rows.labels is not None
    made: Made = []
    for number, row in enumerate(missing_rows(rows.labels, seed)):
        random = np.random.default_rng([seed, row, number])
        text = change(rows.texts[row], config, wordnet, random)
        pair = None if rows.pair_texts is None else change(rows.pair_texts[row], config, wordnet, random)
        made.append((row, text, pair))
    return made


def _with(rows: Rows, made: Made) -> Rows:
    assert rows.labels is not None
    copies: dict[int, int] = {}
    ids = []
    for row, _, _ in made:
        copies[row] = copies.get(row, 0) + 1
        ids.append(f"{rows.ids[row]}+{copies[row]}")
    pairs = None if rows.pair_texts is None else [*rows.pair_texts, *(str(pair) for _, _, pair in made)]
    return dataclasses.replace(
        rows,
        ids=[*rows.ids, *ids],
        texts=[*rows.texts, *(text for _, text, _ in made)],
        pair_texts=pairs,
        labels=np.concatenate([rows.labels, rows.labels[[row for row, _, _ in made]]]),
        notes=[*rows.notes, f"{len(made)} rows made by augmentation"],
    )


def _load(entry: Path) -> Made | None:
    try:
        return [(row, text, pair) for row, text, pair in json.loads(entry.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _store(entry: Path, made: Made) -> None:
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(made), encoding="utf-8")
        os.replace(temporary, entry)
    except OSError:
        temporary.unlink(missing_ok=True)  # a run without a cache entry computes the rows again
