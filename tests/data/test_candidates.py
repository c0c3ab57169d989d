"""Files of the task types choice and ranking: rows, labels, grades, bad rows and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fastmtl.config import Recipe, TaskConfig
from fastmtl.data import spill
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.data.stream import BatchStream
from fastmtl.data.tokenized import tokenize
from fastmtl.errors import UserError

BARE = {"type": "choice"}
LETTERED = {"type": "choice", "data": {"columns": {"text": "q", "choices": ["a", "b", "c"], "label": "right"}}}
GRADED = {"type": "ranking"}
HARD = {"type": "ranking", "data": {"columns": {"text": "query", "choices": ["positive", "negatives"]}}}


def task_of(settings: dict[str, Any]) -> TaskConfig:
    return TaskConfig.model_validate({"data": {}, **settings})


def write(path: Path, rows: list[dict[str, Any]] | str) -> Path:
    if isinstance(rows, str):
        path.write_text(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(rows: Rows) -> list[list[str]]:
    assert rows.items is not None
    return [rows.items.of(row) for row in range(len(rows))]


CHOICES = [
    {"text": "why  so", "choices": ["it is", "it was", "no"], "label": 2},
    {"text": "who", "choices": ["me", "you"], "label": 0},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_of_choices(tmp_path: Path, ending: str) -> None:
    rows = read_file(write(tmp_path / f"f.{ending}", CHOICES), task_of(BARE))
    assert (rows.texts, parts(rows)) == (["why so", "who"], [["it is", "it was", "no"], ["me", "you"]])
    assert rows.labels is not None and rows.labels.tolist() == [2, 0] and rows.labels.dtype == np.int64
    taken = rows.take([1, 0])
    assert (taken.ids, parts(taken)[0]) == (["1", "0"], ["me", "you"])


@pytest.mark.parametrize(
    ("labels", "setting"), [("CB", "auto"), ("cb", "letters"), (["z", "v w"], "auto"), ("21", "auto"), ("32", "from_1")]
)
def test_columns_of_choices_and_kinds_of_labels(tmp_path: Path, labels: list[str], setting: str) -> None:
    text = f"q,a,b,c,right\nx,y,y,z,{labels[0]}\nu,v,v  w,,{labels[1]}\n"
    rows = read_file(write(tmp_path / "f.csv", text), task_of({**LETTERED, "choice": {"labels": setting}}))
    assert parts(rows) == [["y", "y", "z"], ["v", "v w"]]
    assert rows.labels is not None and rows.labels.tolist() == [2, 1]


def test_choices_without_a_text_or_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [{"choices": ["a", "b"], "label": -1, "id": "x"}])
    rows = read_file(file, task_of(BARE), require_labels=False)
    assert (rows.texts, rows.ids, rows.labels) == ([""], ["x"], None)


GROUPS = """group,text,text_pair,label
q2,two words,first,0.5
q1,one,second,0
q2,two  words,third,3
"""


@pytest.mark.parametrize("in_memory", [spill.IN_MEMORY, 10])
def test_groups_that_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY", in_memory)
    rows = read_file(write(tmp_path / "f.csv", GROUPS), task_of(GRADED))
    assert (rows.ids, list(rows.texts), parts(rows)) == (
        ["q2", "q1"],
        ["two words", "one"],
        [["first", "third"], ["second"]],
    )
    assert rows.labels is not None and rows.labels.tolist() == [0.5, 3, 0]
    assert rows.notes == ["f.csv: in 1 of 2 groups all grades are equal, so they teach no order"]


def test_queries_with_positives_and_negatives(tmp_path: Path) -> None:
    given = [
        {"query": "one", "positive": ["a", "b"], "negatives": ["c"]},
        {"query": "two", "positive": "d", "negatives": ["e", "f", "g"]},
    ]
    rows = read_file(write(tmp_path / "f.jsonl", given), task_of(HARD))
    assert parts(rows) == [["a", "b", "c"], ["d", "e", "f", "g"]]
    assert rows.labels is not None and rows.labels.tolist() == [1, 1, 0, 1, 0, 0, 0]
    columns = {"text": "query", "choices": "passages", "label": "selected"}
    listed = [{"query": "one", "passages": ["a", "b"], "selected": [0, 2]}]
    rows = read_file(write(tmp_path / "f.parquet", listed), task_of({**GRADED, "data": {"columns": columns}}))
    assert rows.labels is not None and rows.labels.tolist() == [0, 2]
    assert (
        len(
            read_file(
                tmp_path / "f.parquet",
                task_of({**HARD, "data": {"columns": {"text": "query", "choices": "passages"}}}),
                require_labels=False,
            )
        )
        == 1
    )


def test_parts_of_objects(tmp_path: Path) -> None:
    """Columns of ARC and MS MARCO, as Hugging Face has them."""
    rows = [{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}]
    columns = {"text": "question", "choices": "choices.text", "label": "answerKey"}
    found = read_file(write(tmp_path / "f.parquet", rows), task_of({"type": "choice", "data": {"columns": columns}}))
    assert parts(found) == [["a", "b"]] and found.labels is not None and found.labels.tolist() == [1]
    rows = [{"query": "q", "passages": {"is_selected": [0, 1], "passage_text": ["a", "b"]}}]
    columns = {"text": "query", "choices": "passages.passage_text", "label": "passages.is_selected"}
    task = task_of({**GRADED, "data": {"columns": columns}})
    found = read_file(write(tmp_path / "f.jsonl", rows), task)
    assert parts(found) == [["a", "b"]] and found.labels is not None and found.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="line 1, column passages.passage_text: expected a text or a list of texts"):
        read_file(write(tmp_path / "f.jsonl", [{"query": "q", "passages": ["a"]}]), task)


def choice(**changed: Any) -> list[dict[str, Any]]:
    return [*CHOICES, {**CHOICES[0], **changed}]


def hard(**changed: Any) -> list[dict[str, Any]]:
    return [{"query": "q", "positive": "a", "negatives": ["b"], **changed}]


LISTED = {"type": "ranking", "data": {"columns": {"text": "query", "choices": "positive", "label": "negatives"}}}
BAD: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | str, str]] = {
    "beyond": (BARE, choice(label=3), "line 3, column label: expected a number from 0 to 2, .* from_1 .*, found '3'"),
    "half": (BARE, choice(label=0.5), "line 3, column label: expected a number from 0 to 2"),
    "none": (BARE, choice(label=None), "line 3, column label: expected the right choice, found nothing"),
    "list": (BARE, choice(label=[1]), r"line 3, column label: expected the right choice, found \[1\]"),
    "one choice": (
        BARE,
        choice(choices=["a"], label=0),
        "line 3, column choices: expected two choices or more, found 1",
    ),
    "not a list": (BARE, choice(choices="a"), "line 3, column choices: expected a list of texts to choose from"),
    "not texts": (
        BARE,
        choice(choices=["a", ["b"]]),
        "column choices: entry 1 of the list: expected a text, found a list",
    ),
    "empty text": (
        BARE,
        choice(choices=["a", " ", "c"]),
        "column choices: entry 1 of the list: expected a text, found none",
    ),
    "no text": (BARE, choice(text=""), "line 3, column text: expected a text, found none"),
    "gap": (LETTERED, "q,a,b,c,right\nx,y,,z,A\n", "line 2, column b: expected a text, found none; only the last"),
    "one column": (LETTERED, "q,a,b,c,right\nx,y,,,A\n", "line 2, column b: expected two choices or more, found 1"),
    "letter": (LETTERED, "q,a,b,c,right\nx,y,z,,A\nx,y,z,,C\n", "line 3, column right: expected a letter from A to B"),
    "text": (
        LETTERED,
        "q,a,b,c,right\nx,yy,zz,,yy\nx,yy,yy,,yy\n",
        "line 3, column right: expected the text of one of",
    ),
    "two meanings": (
        BARE,
        [{**CHOICES[0], "choices": ["1", "2"], "label": 1}],
        "may be choice 0 or 1, .* set choice.labels",
    ),
    "no column": (LETTERED, "q,a,b,right\nx,y,z,A\n", "no column 'c' for choices; the file has q, a, b, right"),
    "numbers": (
        {"type": "choice", "data": {"columns": {"choices": [0, 1], "label": 2}}},
        "a,b,A\n",
        "set header: true",
    ),
    "grade": (
        GRADED,
        GROUPS + "q1,one,x,-1\n",
        "line 5, column label: expected a grade, a number from 0 on, found '-1'",
    ),
    "no grade": (
        GRADED,
        GROUPS + "q1,one,x,\n",
        "line 5, column label: expected a grade, a number from 0 on, found nothing",
    ),
    "high grade": (
        {**GRADED, "ranking": {"gains": "exponential"}},
        GROUPS + "q1,one,x,31\n",
        "from 0 to 30, as ranking.gains",
    ),
    "no group": (GRADED, GROUPS + ",one,x,1\n", "line 5, column group: expected the id of a group, found none"),
    "other query": (
        GRADED,
        GROUPS + "q1,two,x,1\n",
        "column text: expected the text that group 'q1' has in line 3, found 'two'",
    ),
    "no candidate": (GRADED, GROUPS + "q1,one,,1\n", "line 5, column text_pair: expected a text, found none"),
    "no positive": (HARD, hard(positive=[]), "line 1, column positive: expected a text or a list of texts, found none"),
    "number of grades": (LISTED, hard(negatives=[1, 0]), "column negatives: expected a list of 1 grades, .* found 2"),
    "no grades": (LISTED, hard(negatives=1), "column negatives: expected a list of 1 grades, .* found 1"),
    "true": (LISTED, hard(positive=["a"], negatives=[True]), "expected a grade, a number from 0 on, found True"),
    "all good": (
        {"type": "ranking", "data": {"columns": {"text": "query", "choices": "positive"}}},
        hard(),
        "names one column",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_line_and_column(tmp_path: Path, name: str) -> None:
    settings, rows, text = BAD[name]
    file = write(tmp_path / ("f.csv" if isinstance(rows, str) else "f.jsonl"), rows)
    with pytest.raises(UserError, match=f"f.(csv|jsonl).*{text}"):
        read_file(file, task_of(settings))


def test_bad_rows_are_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "f.jsonl", [CHOICES[0], {**CHOICES[0], "label": 9}, {**CHOICES[0], "choices": []}, CHOICES[1]]
    )
    rows = read_file(file, task_of(BARE), on_bad_row="skip")
    assert rows.ids == ["0", "3"] and rows.labels is not None and rows.labels.tolist() == [2, 0]
    assert sorted(bad.line for bad in rows.skipped) == [2, 3]


def test_quotes_of_a_file_with_tabs_are_decided(tmp_path: Path) -> None:
    file = write(tmp_path / "f.tsv", 'group\ttext\ttext_pair\tlabel\nq\tone\t"a ""b"" c"\t1\n')
    with pytest.raises(UserError, match="line 2, column text_pair: .* Set quotes: csv"):
        read_file(file, task_of(GRADED))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"type": "choice", "pairs": "bi"}, "pairs: bi does not go with type choice"),
        ({"type": "choice", "data": {"columns": {"label": ["a", "b"]}}}, "has one column of labels"),
        ({**HARD, "data": {"columns": {"choices": "a", "group": "b"}}}, "Name one of the two"),
        ({**GRADED, "data": {"columns": {"id": "a"}}}, "the content of the column group"),
        ({**GRADED, "loss": "mnr"}, "loss: mnr compares the vectors .* needs pairs: bi"),
        ({**HARD, "pairs": "bi", "loss": "mnr", "mnr": {"cached": True}}, "mnr.cached: not for tasks of type ranking"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        task_of(settings)


@pytest.mark.parametrize(("settings", "cut"), [({**GRADED, "pairs": "bi"}, 2), (GRADED, 2), (BARE, 1)])
def test_tokens(tmp_path: Path, tiny_bert: Path, settings: dict[str, Any], cut: int) -> None:
    from transformers import AutoTokenizer

    if settings["type"] == "ranking":
        rows = read_file(write(tmp_path / "f.csv", GROUPS.replace("second", "a b c d e f")), task_of(settings))
    else:
        rows = read_file(
            write(tmp_path / "f.jsonl", [{"choices": ["a", "b c d e f g h"], "label": 0}]), task_of(settings)
        )
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    task, most = task_of(settings), 7
    found = tokenize(rows, tokenizer, task, most, tmp_path / "cache", keep_rows=True)
    expected = []
    for row, items in enumerate(parts(rows)):
        if task.pairs == "bi":
            texts: list[Any] = [(text, None) for text in (rows.texts[row], *items)]
        else:
            texts = [(rows.texts[row], item) if rows.texts[row] else (item, None) for item in items]
        expected += [tokenizer(*pair, truncation="longest_first", max_length=most)["input_ids"] for pair in texts]
    assert [part.tolist() for part in np.split(found.tokens, found.offsets[1:-1])] == expected
    assert found.units is not None and found.units.offsets.tolist() == rows.items.offsets.tolist()
    assert found.example_offsets is not None and found.example_offsets[-1] == len(expected)
    assert found.truncated == cut


def test_the_longest_row_of_a_small_batch_is_named(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    recipe = Recipe.model_validate({"tasks": {"find": GRADED | {"data": {}}}, "sampler": {"batch_tokens": 20}})
    rows = read_file(write(tmp_path / "f.csv", GROUPS), recipe.tasks["find"])
    data = tokenize(rows, AutoTokenizer.from_pretrained(tiny_bert), recipe.tasks["find"], 64, tmp_path / "cache")
    with pytest.raises(UserError, match=r"less than the \d+ tokens of row q2 of find with its 2 texts \(.*f.csv\)"):
        BatchStream([data], recipe)
