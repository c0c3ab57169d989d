"""Metrics of entities against seqeval's results; predictions, tables and summaries of words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file
from fastmtl.data.tokenized import tokenize
from fastmtl.data.types.tokens import piece_tags
from fastmtl.errors import UserError
from fastmtl.inference.entities import Entities, Mode, entity_counts, precision_recall_f1
from fastmtl.inference.pieces import word_scores
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.tokens import TOKENS, Entity

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
IOBES = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES")]


def task(names: list[str] = BIO, scheme: str = "bio") -> TaskConfig:
    return TaskConfig.model_validate({"type": "tokens", "label_names": names, "tokens": {"scheme": scheme}, "data": {}})


def entities(config: TaskConfig, text: str, mode: Mode) -> Entities:
    """Return the entities of sentences that are separated by a bar."""
    assert config.label_names is not None
    parts = [part.split() for part in text.split("|")]
    tags = [config.label_names.index(tag) for part in parts for tag in part]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Entities(config, np.array(tags), offsets, mode)


# labels, predictions, (precision, recall, F1) of seqeval 1.2.2 in its modes default and strict
SEQEVAL: list[tuple[str, str, str, tuple[float, ...], tuple[float, ...]]] = [
    ("bio", "B-PER I-PER O | B-LOC O", "B-PER I-PER O | B-LOC O", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    ("bio", "O O B-PER I-PER O B-LOC I-LOC", "O I-PER I-PER I-PER O I-LOC I-LOC", (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    ("bio", "B-PER I-PER B-PER O|I-LOC", "B-PER B-PER B-PER I-LOC|B-LOC", (0.4, 0.6667, 0.5), (0.25, 0.5, 0.3333)),
    (
        "bio",
        "B-PER I-PER B-LOC|O I-LOC I-PER",
        "B-PER I-PER I-LOC | O I-LOC I-PER",
        (1.0, 1.0, 1.0),
        (1.0, 0.5, 0.6667),
    ),
    ("bio", "O O | O", "O O | O", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ("bio", "B-PER | O", "O | O", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ("iobes", "B-PER E-PER O S-LOC", "B-PER E-PER O S-LOC", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    ("iobes", "B-PER I-PER E-PER | S-LOC O", "B-PER E-PER E-PER | B-LOC O", (0.3333, 0.5, 0.4), (0.0, 0.0, 0.0)),
    ("iobes", "S-PER S-PER B-LOC E-LOC", "S-PER I-PER B-LOC E-PER", (0.5, 0.6667, 0.5714), (1.0, 0.3333, 0.5)),
    ("iobes", "B-PER I-PER O | E-LOC S-LOC", "B-PER I-PER O | E-LOC S-LOC", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize(("scheme", "gold", "predicted", "default", "strict"), SEQEVAL)
def test_metrics_equal_seqeval(
    scheme: str, gold: str, predicted: str, default: tuple[float, ...], strict: tuple[float, ...]
) -> None:
    config = task(BIO if scheme == "bio" else IOBES, scheme)
    modes: tuple[Mode, Mode] = ("default", "strict")
    for mode, expected in zip(modes, (default, strict), strict=True):
        counts = entity_counts(entities(config, gold, mode), entities(config, predicted, mode))
        assert precision_recall_f1(*counts.sum(axis=0).tolist()) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("names", "scheme"), [(BIO, "bio"), (IOBES, "iobes")])
def test_entities_of_random_tags_equal_those_of_a_loop(names: list[str], scheme: str) -> None:
    random, config = np.random.default_rng(0), task(names, scheme)
    for _ in range(200):
        offsets = np.concatenate([[0], np.cumsum(random.integers(1, 7, 4))])
        tags = random.integers(0, len(names), offsets[-1])
        found = [
            (first + start, kind, first + end)
            for first, stop in zip(offsets[:-1], offsets[1:], strict=True)
            for start, kind, end in loop([names[tag] for tag in tags[first:stop]], scheme)
        ]
        result = Entities(config, tags, offsets, "strict")
        expected = zip(result.starts, (result.types[kind] for kind in result.kinds), result.ends, strict=True)
        assert found == list(expected)


def loop(tags: list[str], scheme: str) -> list[tuple[int, str, int]]:
    """Return first word, type and last word of each entity that follows the scheme."""
    found = []
    for start, tag in enumerate(tags):
        end, kind = start + 1, tag[2:]
        if tag[0] == "B":
            while end < len(tags) and tags[end] == f"I-{kind}":
                end += 1
            if scheme == "iobes" and end < len(tags) and tags[end] == f"E-{kind}":
                found.append((start, kind, end))
        if (tag[0] == "B" and scheme == "bio") or tag[0] == "S":
            found.append((start, kind, end - 1))
    return found


@pytest.fixture(scope="module")
def scores(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Scores of two sentences: one whose last word is cut off, one with a word without a label."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"id": "p", "words": ["ana", "lee", "sings"], "tags": ["B-PER", "I-PER", "O"]},
        {"id": "q", "words": ["a", "cat", "in", "bonn"], "tags": ["O", None, "O", "B-LOC"]},
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, local_files_only=True)
    dataset = tokenize(read_file(folder / "a.jsonl", task()), tokenizer, task(), 7, folder, keep_rows=True)
    assert dataset.units is not None and dataset.units.items is not None
    assert dataset.units.items.tolist() == [0, 1, 0, 1, 2, 3]  # "sings" is cut off
    tags = np.array([1, 4, 0, 3, 3, 3])
    return Scores(dataset, np.concatenate([tags[:, None], 0.2 + 0.6 * np.eye(5)[tags]], axis=1).astype(np.float32))


def test_metrics_of_words(scores: Scores) -> None:
    """Right: ana, sings, a, bonn. The predicted entities: PER ana, LOC lee, LOC in, LOC bonn."""
    found = TOKENS.evaluate(task(), scores)
    assert found == pytest.approx(
        {"f1": 2 * 0.25 * 0.5 / 0.75, "precision": 0.25, "recall": 0.5, "strict_f1": 0.4, "accuracy": 4 / 6}
    )
    assert tuple(found) == TOKENS.metrics(task())
    broken = dataclasses.replace(scores, scores=np.full_like(scores.scores, np.nan))
    with pytest.raises(UserError, match="not finite"):
        TOKENS.evaluate(task(), broken)


def test_predictions_and_table(scores: Scores) -> None:
    first, second = TOKENS.predictions(task(), scores)
    assert first.tags == ["B-PER", "I-LOC", "O"] and first.words == ["ana", "lee", "sings"]
    assert first.entities == [Entity("PER", 0, 1, "ana"), Entity("LOC", 1, 2, "lee")]
    assert first.probabilities[0] == pytest.approx((0.2, 0.8, 0.2, 0.2, 0.2)) and first.probabilities[2] is None
    assert second.entities[0] == Entity("LOC", 1, 2, "cat")
    head, lines = TOKENS.table(task(), scores)
    found = list(lines)
    assert head[:5] == ["id", "word_number", "word", "predicted", "p_O"] and len(head) == 9
    assert found[1][:6] == ["p", "2", "lee", "I-LOC", "0.200000", "0.200000"]
    assert found[2] == ["p", "3", "sings", "O", "", "", "", "", ""]
    taken = dataclasses.replace(scores, dataset=scores.dataset.take(np.array([1])), scores=scores.scores[2:])
    assert TOKENS.predictions(task(), taken) == [second]


def test_summary(scores: Scores) -> None:
    found = TOKENS.summary(task(), scores)
    assert found.names == ["O", "PER", "LOC"] and found.confusion == [[2, 0, 1], [0, 1, 1], [0, 0, 1]]
    assert found.per_label is not None and found.errors is not None
    assert found.per_label.rows == [["PER", "0.000", "0.000", "0.000", "1"], ["LOC", "0.333", "1.000", "0.500", "1"]]
    assert found.errors.rows == [
        ["p", "ana lee sings", "lee/I-PER", "lee/I-LOC"],
        ["q", "a cat in bonn", "in/O", "in/B-LOC"],
    ]
    plain = TOKENS.summary(task(scheme="none"), scores)
    assert plain.names == BIO and plain.per_label is not None
    assert plain.per_label.rows[0] == ["O", "1.000", "0.667", "0.800", "3"]
    assert TOKENS.statistics(task(), scores.dataset) == {"0": 2, "1": 1, "2": 1, "3": 1, "4": 0}


def test_words_of_pieces_with_iobes() -> None:
    """The pieces of each tag's words give the tag back; probabilities add up to 1."""
    tokens = {"scheme": "iobes", "subwords": "all"}
    config = TaskConfig.model_validate({"type": "tokens", "label_names": IOBES, "tokens": tokens, "data": {}})
    tags, of_pieces = np.arange(len(IOBES)), piece_tags(config)
    first, last = of_pieces[1, 0], of_pieces[0, 1]
    assert [IOBES[tag] for tag in first] == [
        "O",
        *["B-PER", "I-PER", "I-PER", "B-PER", "B-LOC", "I-LOC", "I-LOC", "B-LOC"],
    ]
    pieces = [np.concatenate([part[:, None], 0.02 + 0.82 * np.eye(9)[part]], axis=1) for part in (first, last)]
    found = word_scores(config, *pieces)
    assert found[:, 0].tolist() == tags.tolist() == found[:, 1:].argmax(axis=1).tolist()
    np.testing.assert_allclose(found[:, 1:].sum(axis=1), 1)
    np.testing.assert_array_equal(word_scores(config, pieces[1], pieces[1]), pieces[1])  # words of one piece
    mixed = word_scores(config, pieces[0][[1, 0]], pieces[1][[0, 1]])
    assert [IOBES[int(tag)] for tag in mixed[:, 0]] == ["S-PER", "O"]


def test_sentences_of_predict() -> None:
    rows = TOKENS.rows_of(task(), ["Ana  sings", ["New York", "in"]])
    assert rows.items is not None and rows.texts == ["Ana sings", "New York in"]
    assert rows.items.texts == ["Ana", "sings", "New York", "in"] and rows.items.offsets.tolist() == [0, 2, 4]
    for wrong, reason in [("a b", "not one string"), ([["a", 1]], "neither a list of words"), ([" "], "has no word")]:
        with pytest.raises(UserError, match=reason):
            TOKENS.rows_of(task(), wrong)
