"""Files of questions in all formats, their bad rows, and the windows over long contexts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_bert import WORDS
from tiny_tokenizers import save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file, read_places
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset, tokenize
from fastmtl.errors import UserError

CONTEXT = "  The cat,\nit sat.  A dog  ran — é\n"  # spaces before, within and after
ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "question": " Who  sat? ",
        "context": CONTEXT,
        "answers": {"text": ["The cat", "cat,"], "answer_start": [2, 6]},
    },
    {"id": "b", "question": "Who ran?", "context": CONTEXT, "answers": {"text": ["A dog  ran"], "answer_start": [20]}},
    {"id": "c", "question": "Who ate?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]
ANSWERS = [[(2, "The cat"), (6, "cat,")], [(20, "A dog  ran")], []]


def task(*, unanswerable: bool = True, stride: int = 2, max_question: int = 6, **data: Any) -> TaskConfig:
    span = {"unanswerable": unanswerable, "stride": stride, "max_question": max_question}
    return TaskConfig.model_validate({"type": "span", "span": span, "data": data})


def squad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows as SQuAD's JSON, with each context's questions together."""
    paragraphs: dict[str, list[Any]] = {}
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        question = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.setdefault(row["context"], []).append(question)
    made = [{"context": context, "qas": qas} for context, qas in paragraphs.items()]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [*made]}]}


def test_files_of_all_formats_have_the_same_questions(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(squad(ROWS)))
    (tmp_path / "lines.json").write_text(json.dumps(squad(ROWS), indent=1, ensure_ascii=False))
    (tmp_path / "table.json").write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "q", "c", "a", "s"])
        for row, answers in zip(ROWS, ANSWERS, strict=True):
            start, text = answers[0] if answers else (-1, "")
            writer.writerow([row["id"], row["question"], row["context"], text, start])
    csv_columns = {"id": "id", "text": "q", "text_pair": "c", "answer": "a", "answer_start": "s"}
    settings: dict[str, dict[str, Any]] = {
        "one.json": {},
        "lines.json": {"format": "squad"},
        "table.json": {"format": "squad"},
        "a.parquet": {"columns": {"id": "id", "text": "question", "text_pair": "context"}},
        "a.csv": {"columns": csv_columns},
    }
    for name, data in settings.items():
        rows = read_file(tmp_path / name, task(**data))
        assert rows.texts == ["Who sat?", "Who ran?", "Who ate?"] and rows.ids == ["a", "b", "c"], name
        assert rows.pair_texts == [CONTEXT] * 3, name
        assert rows.answers == ([answers[:1] for answers in ANSWERS] if name == "a.csv" else ANSWERS), name
        assert read_file(tmp_path / name, task(**data), require_labels=False).answers is None
    both = read_places([tmp_path / "one.json", tmp_path / "lines.json"], task())
    assert both.answers == ANSWERS * 2


def changed(**values: Any) -> list[dict[str, Any]]:
    return [ROWS[0], {**ROWS[1], **values}]


BAD: dict[str, tuple[list[dict[str, Any]], bool, str]] = {
    "elsewhere": (
        changed(answers={"text": ["A dog"], "answer_start": [19]}),
        True,
        "column answers: expected the answer 'A dog' at character 19, found ' A do' there; it begins at 20.",
    ),
    "outside": (
        changed(answers={"text": ["x"], "answer_start": [35]}),
        True,
        "column answers: expected the answer's place in the context, from 0 to 34, found 35.",
    ),
    "negative": (changed(answers={"text": ["x"], "answer_start": [-1]}), True, "from 0 to 34, found -1."),
    "empty answer": (
        changed(answers={"text": [" "], "answer_start": [1]}),
        True,
        "column answers: expected the text of an answer, found ' '.",
    ),
    "no answer": ([ROWS[0], ROWS[2]], False, "column answers: there is no answer; span.unanswerable: true allows"),
    "no question": (changed(question="\n "), True, "column question: expected a text, found none."),
    "no context": (changed(context=" "), True, "column context: expected a text, found none."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_place_and_column(tmp_path: Path, name: str) -> None:
    rows, unanswerable, message = BAD[name]
    config = task(unanswerable=unanswerable, format="squad")
    question = f"question {rows[1]['id']!r} (data[0].paragraphs[{int(name == 'no context')}].qas"
    for file, content, place in (
        ("a.jsonl", "\n".join(map(json.dumps, rows)), "line 2"),
        ("a.json", json.dumps(squad(rows)), question),
    ):
        path = tmp_path / file
        path.write_text(content)
        with pytest.raises(UserError) as error:
            read_file(path, config)
        assert str(error.value).startswith(f"{path}, {place}") and message in str(error.value)
        kept = read_file(path, config, on_bad_row="skip")
        assert kept.ids == ["a"] and len(kept.skipped) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n{"paragraphs": }]}', ", line 2, column 16: expected JSON: Expecting value"),
        ('{"data": [1]}', ", data[0], column data: expected an object, found 1."),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', ", data[0].paragraphs[0], column qas: expected a list"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]}',
            ", data[0].paragraphs[0].qas[0], column answers: exp",
        ),
        ('{"data": []}', ": no rows"),
    ],
)
def test_a_broken_squad_file_names_the_place(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_file(path, task(format="squad"))
    assert f"{path}{message}" in str(error.value)


def test_columns_of_answers_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text_pair,answer,answer_start\na,b,b,0\n")
    for columns in ({"answer": "answer"}, {"answer": "answer", "answer_start": "answer_start", "answers": "answer"}):
        with pytest.raises(UserError, match="give answers, or answer and answer_start"):
            read_file(tmp_path / "a.csv", task(columns=columns))
    with pytest.raises(UserError, match="no column 'answers' for answers"):
        read_file(tmp_path / "a.csv", task())
    with pytest.raises(UserError, match="line 2, column answer: expected answers as"):
        read_file(tmp_path / "a.csv", task(columns={"answers": "answer"}))


@pytest.fixture(scope="module", params=["wordpiece", "bytes", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(request.param, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows() -> Rows:
    random = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(random.choice(WORDS, words))

    contexts = [text(words) for words in (1, 3, 17, 60, 61, 62, 200)]
    answers = []
    for context in contexts:
        start = int(random.integers(len(context)))
        start += len(context[start:]) - len(context[start:].lstrip())
        answers.append([(start, context[start : start + int(random.integers(1, 30))])])
    questions = [text(int(words)) for words in random.integers(1, 4, len(contexts))]
    ids = [str(row) for row in range(len(contexts))]
    return Rows(Path("made"), ids, questions, contexts, None, answers=[*answers[:-1], []])


def test_windows_are_those_of_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, tmp_path: Path, run_qa_labels: Callable[..., Any]
) -> None:
    config = task(stride=7, max_question=20)
    found = tokenize(rows, tokenizer, config, 40, tmp_path / "cache")
    again = tokenize(rows, tokenizer, config, 40, tmp_path / "cache")
    assert found.units is not None and again.units is not None and found.row_of is not None
    assert found.digest() == again.digest()
    expected = tokenizer(
        rows.texts,
        list(rows.pair_texts or ()),
        truncation="only_second",
        max_length=40,
        stride=7,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    assert found.row_of.tolist() == expected["overflow_to_sample_mapping"]
    for window, ids in enumerate(expected["input_ids"]):
        start, stop = found.offsets[window : window + 2]
        assert found.tokens[start:stop].tolist() == ids
        if found.row_of[window] != found.row_of[window - 1]:  # tokenizers gives further windows types of its own
            types = np.arange(len(ids)) >= found.second_text[window]
            assert types.astype(int).tolist() == expected["token_type_ids"][window]
        parts = expected.sequence_ids(window)
        mapping = expected["offset_mapping"][window]
        spans = [list(span) if part == 1 else [-1, -1] for span, part in zip(mapping, parts, strict=True)]
        assert found.units.spans is not None and found.units.places is not None
        assert found.units.spans[start:stop].tolist() == spans
        assert found.units.places[start:stop].tolist() == list(range(len(ids)))
        assert found.labels is not None
        answers = (rows.answers or [])[int(found.row_of[window])]
        assert found.labels[window].tolist() == run_qa_labels(mapping, parts, answers)
    assert found.labels is not None and (found.labels[:, 0] > 0).sum() >= 6
    some = found.take(found.examples_of(np.array([1, 3])))
    assert some.row_of is not None and set(some.row_of.tolist()) == {1, 3} and (some.num_rows, found.num_rows) == (2, 7)
    assert len(some) == np.isin(found.row_of, [1, 3]).sum()


@pytest.fixture(scope="module")
def run_qa_labels() -> Callable[..., list[int]]:
    """Return the function of transformers' example run_qa.py that finds the ends of an answer."""

    def labels(mapping: list[tuple[int, int]], parts: list[int | None], answers: list[tuple[int, str]]) -> list[int]:
        if not answers:
            return [0, 0]
        start, stop = answers[0][0], answers[0][0] + len(answers[0][1].rstrip())
        first, last = parts.index(1), len(parts) - 1 - parts[::-1].index(1)
        if not (mapping[first][0] <= start and mapping[last][1] >= stop):
            return [0, 0]
        while first < len(mapping) and parts[first] == 1 and mapping[first][0] <= start:
            first += 1
        while mapping[last][1] >= stop and parts[last] == 1:
            last -= 1
        return [first - 1, last + 1]

    return labels


def test_long_questions_are_cut_and_counted(tmp_path: Path, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = Rows(Path("made"), ["0", "1"], ["a b c d e f g", "a"], ["the cat sat", "a dog"], None)
    found = tokenize(rows, tokenizer, task(stride=1, max_question=4), 16, tmp_path / "cache")
    assert found.truncated == 1 and question_of(found, tokenizer) == "a b c d"
    tokenizer.truncation_side = "left"
    left = tokenize(rows, tokenizer, task(stride=1, max_question=4), 16, tmp_path / "cache")
    assert question_of(left, tokenizer) == "d e f g" and left.labels is None


def question_of(found: TokenizedDataset, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(found.tokens[1 : found.second_text[0] - 1]))


def test_windows_without_room_are_refused(tmp_path: Path, tiny_bert: Path, rows: Rows) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with pytest.raises(UserError, match=r"span.stride: 10 and span.max_question: 20 .* until their sum is below 29"):
        tokenize(rows, tokenizer, task(stride=10, max_question=20), 32, tmp_path / "cache")
