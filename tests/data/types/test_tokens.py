"""Files of sentences in all formats, and the pieces of their words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import save_tokenizer
from transformers import AutoTokenizer

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import tokenize
from fastmtl.data.types.tokens import piece_tags
from fastmtl.errors import UserError

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
IOBES = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES")]


def task(names: list[str] = BIO, scheme: str = "bio", subwords: str = "first", **data: Any) -> TaskConfig:
    tokens = {"scheme": scheme, "subwords": subwords}
    return TaskConfig.model_validate({"type": "tokens", "label_names": names, "tokens": tokens, "data": data})


def sentences(rows: Rows) -> list[tuple[list[str], list[int]]]:
    assert rows.items is not None
    labels = np.zeros(len(rows.items.texts), int) if rows.labels is None else rows.labels
    parts = zip(rows.items.offsets[:-1], rows.items.offsets[1:], strict=True)
    return [(rows.items.texts[a:b], labels[a:b].tolist()) for a, b in parts]


EXPECTED = [(["Ana", "Lee", "sings", "in", "#"], [1, 2, 0, 0, -100]), (["Bonn"], [3])]
CONLL = """-DOCSTART- -X- O

# sent_id = first
# a comment of several words
Ana NNP B-PER
Lee NNP I-PER
sings VB O
in IN O
# SYM _

Bonn NNP B-LOC
"""
CONLLU = """# sent_id = first
# text = Ana Lee sings in #
1\tAna\t_\tX\tB-PER\t_\t_\t_\t_\t_
2-3\tLee sings\t_\t_\t_\t_\t_\t_\t_\t_
2\tLee\t_\tX\tI-PER\t_\t_\t_\t_\t_
3\tsings\t_\tX\tO\t_\t_\t_\t_\t_
3.1\tgone\t_\tX\tO\t_\t_\t_\t_\t_
4\tin\t_\tX\tO\t_\t_\t_\t_\t_
5\t#\t_\tX\t_\t_\t_\t_\t_\t_

1\tBonn\t_\tX\tB-LOC\t_\t_\t_\t_\t_
"""


def test_files_of_all_formats_have_the_same_sentences(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(CONLL)
    (tmp_path / "a.txt").write_text(CONLL.replace(" ", "\t").replace("\n", "\r\n"))
    (tmp_path / "a.conllu").write_text(CONLLU)
    rows: list[dict[str, Any]] = [
        {"tokens": ["Ana", "Lee", "sings", "in", "#"], "labels": ["B-PER", "I-PER", "O", "O", None]},
        {"tokens": ["Bonn"], "labels": ["B-LOC"]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = [{"id": name, "w": words, "t": tags} for name, (words, tags) in zip("pq", EXPECTED, strict=True)]
    pq.write_table(pa.Table.from_pylist(ids), tmp_path / "a.parquet")
    found = {
        "a.conll": read_file(tmp_path / "a.conll", task()),
        "a.txt": read_file(tmp_path / "a.txt", task(format="conll", columns={"words": 0, "label": 2})),
        "a.conllu": read_file(tmp_path / "a.conllu", task(columns={"label": "xpos"})),
        "a.jsonl": read_file(tmp_path / "a.jsonl", task()),
        "a.parquet": read_file(tmp_path / "a.parquet", task(columns={"words": "w", "label": "t"})),
    }
    for file, one in found.items():
        assert sentences(one) == EXPECTED, file
    assert found["a.conllu"].ids == found["a.conll"].ids == ["first", "1"] and found["a.parquet"].ids == ["p", "q"]
    assert found["a.jsonl"].texts == ["Ana Lee sings in #", "Bonn"]


def test_a_file_without_tags(tmp_path: Path) -> None:
    (tmp_path / "w.conll").write_text("Ana\nsings\n\nBonn\n")
    rows = read_file(tmp_path / "w.conll", task(), require_labels=False)
    assert rows.labels is None and [words for words, _ in sentences(rows)] == [["Ana", "sings"], ["Bonn"]]
    with pytest.raises(UserError, match="no column 1 for label; the file has 1 columns"):
        read_file(tmp_path / "w.conll", task())


BAD = {
    "a.conll, line 3, column 2: expected 3 columns, found 2": CONLL.replace("Bonn NNP", "Bonn"),
    "line 5, column 2: the word 'Ana' has the tag 'B-ORG'; expected one of O, B-PER": CONLL.replace("B-PER", "B-ORG"),
    "line 8, column 2: the word 'in': I-LOC cannot follow O (scheme bio)": CONLL.replace("IN O", "IN I-LOC"),
    "line 6, column 2: the word 'Lee': I-LOC cannot follow B-PER": CONLL.replace("I-PER", "I-LOC"),
    "line 11, column 2: the word 'Bonn': I-LOC cannot begin a sentence": CONLL.replace("B-LOC", "I-LOC"),
    "line 7, column byte 1: expected UTF-8, found byte 0xff": CONLL.replace("sings", "\udcff"),
    "line 7, column 0: expected a word, found none": CONLL.replace("sings", "\u3000"),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_of_columns(tmp_path: Path, reason: str) -> None:
    file = tmp_path / "a.conll"
    content = BAD[reason]
    if "found 2" in reason:
        content = "Ana NNP B-PER\n\nBonn B-LOC\n\nRome NNP B-LOC\n"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_file(file, task())
    assert reason in str(caught.value)
    rows = read_file(file, task(), on_bad_row="skip")
    assert rows.ids[-1] in ("first", "1", "2") and ("Rome" not in content or rows.ids == ["0", "2"])
    assert len(rows.skipped) == 1 and str(rows.skipped[0]) in str(caught.value)
    assert all((words, tags) in [*EXPECTED, (["Ana"], [1]), (["Rome"], [3])] for words, tags in sentences(rows))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (
            "a.conllu",
            CONLLU.replace("5\t#\t_", "5\t#"),
            "line 9, column misc: expected 10 columns",
        ),
        ("a.conllu", CONLLU.replace("4\tin", "x\tin"), "line 8, column id: expected the number of a word, found 'x'"),
        ("a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}', "line 1, column tags: 2 words, but 1 tags"),
        (
            "a.jsonl",
            '{"words": "a b", "tags": ["O"]}',
            "column words: expected a list with a value per word",
        ),
        ("a.jsonl", '{"words": ["a", [1]], "tags": [0, 0]}', "line 1, column words: expected a text, found a list"),
        ("a.jsonl", '{"words": ["a", " "], "tags": [0, 0]}', "line 1, column words: expected a word, found none"),
        (
            "a.jsonl",
            '{"words": ["a"], "tags": [5]}',
            "line 1, column tags: the word 'a' has the tag 5",
        ),
        (
            "a.jsonl",
            '{"words": ["a", "b"], "tags": [null, "_"]}',
            "expected a tag, but no word of the sent",
        ),
        ("a.jsonl", '{"words": [], "tags": []}', "line 1, column words: expected a list of words, found an empty one"),
        ("a.jsonl", '{"text": "a"}', "no column words or tokens for words; the file has text"),
        ("a.txt", "Ana B-PER\n", "set data.format to conll or conllu"),
    ],
)
def test_bad_rows_of_other_formats(tmp_path: Path, file: str, content: str, reason: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as caught:
        read_file(tmp_path / file, task(columns={"label": "xpos"} if file.endswith("u") else {}))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("file", "columns", "reason"),
    [
        ("a.conll", {"label": "ner"}, "columns.label: CoNLL columns have no names: give a number from 0"),
        ("a.conll", {"label": 3}, "no column 3 for label; the file has 3 columns"),
        ("a.conll", {"words": 3}, "no column 3 for words; the file has 3 columns"),
        ("a.conll", {"id": 1}, "columns.id: a sentence has its id in a comment"),
        ("a.conllu", {"label": "ner"}, "data.columns.label: 'ner' is no column of CoNLL-U, which has id, form"),
        ("a.jsonl", {"label": "ner"}, "no column 'ner' for label; the file has words, tags"),
    ],
)
def test_columns_that_a_file_does_not_have(tmp_path: Path, file: str, columns: dict[str, Any], reason: str) -> None:
    content = {"a.conll": CONLL, "a.conllu": CONLLU, "a.jsonl": '{"words": ["a"], "tags": ["O"]}'}
    (tmp_path / file).write_text(content[file])
    with pytest.raises(UserError) as caught:
        read_file(tmp_path / file, task(columns=columns))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ("S-PER O B-LOC I-LOC E-LOC", None),
        ("B-PER _ E-LOC", None),
        ("B-PER E-LOC", "line 2, column 1: the word 'w': E-LOC cannot follow B-PER (scheme iobes)"),
        ("S-PER I-PER", "line 2, column 1: the word 'w': I-PER cannot follow S-PER"),
        ("O B-PER", "line 2, column 1: the word 'w': B-PER cannot end a sentence"),
        ("E-PER", "line 1, column 1: the word 'w': E-PER cannot begin a sentence"),
    ],
)
def test_sequences_of_iobes(tmp_path: Path, tags: str, reason: str | None) -> None:
    (tmp_path / "a.conll").write_text("\n".join(f"w {tag}" for tag in tags.split()))
    if reason is None:
        assert len(read_file(tmp_path / "a.conll", task(IOBES, "iobes"))) == 1
    else:
        with pytest.raises(UserError) as caught:
            read_file(tmp_path / "a.conll", task(IOBES, "iobes"))
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("names", "scheme", "subwords", "reason"),
    [
        (["B-PER", "I-PER"], "bio", "first", "needs the tag O"),
        (["O", "B-PER", "E-PER"], "bio", "first", "'E-PER' is no tag of the scheme bio"),
        (["O", "PER"], "bio", "first", "'PER' is no tag of the scheme bio"),
        (["O", "B-PER", "I-LOC"], "bio", "first", "I-LOC without B-LOC"),
        (["O", "S-PER"], "iobes", "all", "add B-PER to label_names"),
    ],
)
def test_tags_that_do_not_fit_the_scheme(names: list[str], scheme: str, subwords: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        task(names, scheme, subwords)


WORDS = ["film", ",", "goodbye", "\u0007", "'s", "cat"]


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_pieces_of_words_are_those_of_the_sentence(tmp_path: Path, kind: str) -> None:
    save_tokenizer(kind, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    (tmp_path / "a.jsonl").write_text(json.dumps({"words": WORDS}) + '\n{"words": ["cat"]}')
    rows = read_file(tmp_path / "a.jsonl", task(), require_labels=False)
    whole = tokenizer(" ".join(WORDS), return_offsets_mapping=True)
    owner = [max(index, 0) for index, word in enumerate(WORDS) for _ in " " + word][1:]  # a space: of the word after it
    items = [owner[max(start, stop - 1)] for start, stop in whole["offset_mapping"][1:-1]]
    words = [0, 1, 2, 4, 5] if kind == "wordpiece" else [0, 1, 2, 3, 4, 5]  # BERT drops control characters
    assert sorted(set(items)) == words
    for subwords, places in (
        ("first", [1 + items.index(word) for word in words]),
        ("last", [len(items) - items[::-1].index(word) for word in words]),
        ("all", list(range(1, len(items) + 1))),
    ):
        dataset = tokenize(rows, tokenizer, task(subwords=subwords), 64, tmp_path)
        assert dataset.units is not None and dataset.tokens[: dataset.offsets[1]].tolist() == whole["input_ids"]
        stop = dataset.units.offsets[1]
        assert dataset.units.places[:stop].tolist() == places
        assert dataset.units.items[:stop].tolist() == [items[place - 1] for place in places]
        assert set(dataset.units.items[stop:].tolist()) == {0}
        assert [note[:27] for note in dataset.notes] == ["1 of 7 words have no token,"] * (len(words) == 5)


def test_labels_of_pieces(tiny_bert: Path, tmp_path: Path) -> None:
    """Further pieces of a word continue its entity; a sentence that is cut loses its last words."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, local_files_only=True)
    tags = ["B-PER", "E-PER", "O", "S-LOC", None, "O"]
    words = ["xyz", "xy", "cat", "xyz", "xyz", "dog"]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"words": words, "tags": tags}) + '\n{"words": ["xy", "."], "tags": [null, "O"]}'
    )
    config = task(IOBES, "iobes", "all")
    rows = read_file(tmp_path / "a.jsonl", config)

    def labels(max_length: int, config: TaskConfig) -> tuple[list[str], list[int]]:
        dataset = tokenize(rows, tokenizer, config, max_length, tmp_path)
        assert dataset.labels is not None and dataset.loss_terms is not None
        return [IOBES[label] if label >= 0 else "-" for label in dataset.labels], dataset.loss_terms.tolist()

    pieces = "B-PER I-PER I-PER I-PER E-PER O B-LOC I-LOC E-LOC - - - O - - O"
    assert labels(64, config) == (pieces.split(), [10, 1])
    assert labels(9, config) == ("B-PER I-PER I-PER I-PER E-PER O S-LOC - - O".split(), [7, 1])
    assert labels(64, task(IOBES, "iobes", "last")) == ("B-PER E-PER O S-LOC - O - O".split(), [5, 1])
    bio = [BIO.index(tag) for tag in ("B-PER", "I-PER")]
    assert piece_tags(task(subwords="all"))[0, 0, bio].tolist() == [BIO.index("I-PER")] * 2
    note = tokenize(rows, tokenizer, config, 9, tmp_path).notes
    assert note[0].startswith("2 of 8 words have no token") and note[0].endswith("predicted as O")
