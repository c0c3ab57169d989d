"""Common file formats: quotes, headers, line ends, GLUE's tasks, and labels in every format."""

from __future__ import annotations

import csv
import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError

SPAM = TaskConfig.model_validate(
    {
        "type": "classification",
        "label_names": ["ham", "spam"],
        "data": {"columns": {"text": "text", "label": "label"}},
    }
)
BY_NAME = {"text": "text", "label": "label"}


def task(kind: str = "binary", **values: Any) -> TaskConfig:
    data = {"format": "table", "columns": BY_NAME, **values.pop("data", {})}
    return TaskConfig.model_validate({"type": kind, "data": data, **values})


def read(path: Path, content: str | bytes, config: TaskConfig | None = None, **how: Any) -> Rows:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path, config or task(), **how)


def refused(path: Path, content: str | bytes, config: TaskConfig | None = None, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, content, config, **how)
    (line,) = error.value.lines
    assert line.startswith(str(path))
    return line


JOINED = 'text\tlabel\n"oh\t1\nfine film\t0\nwell\t0\nyes"\t1\nlast\t0\n'


def test_tabs_have_no_quotes_unless_the_recipe_says_so(tmp_path: Path) -> None:
    path = tmp_path / "q.tsv"
    assert read(path, JOINED).texts == ['"oh', "fine film", "well", 'yes"', "last"]
    assert read(path, 'text\tlabel\n"great film" they said\t1\n').texts == ['"great film" they said']
    csv_quotes = task(data={"quotes": "csv"})
    assert read(path, 'text\tlabel\n"a ""great""\tfilm"\t1\n', csv_quotes).texts == ['a "great" film']
    line = refused(path, 'text\tlabel\n"a ""great"" film"\t1\n')
    assert "line 2, column text" in line and "Set quotes: csv" in line
    assert read(path, 'text\tlabel\n"a ""great"" film"\t1\n', task(data={"quotes": "none"})).texts == [
        '"a ""great"" film"'
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_quotes_never_join_rows(tmp_path: Path, ending: str) -> None:
    path, delimiter = tmp_path / f"q.{ending}", "," if ending == "csv" else "\t"
    quotes = task(data={"quotes": "csv"})
    line = refused(path, JOINED.replace("\t", delimiter), quotes)
    assert "line 2" in line and "ends in line 5, and line 2 looks like a row" in line
    kept = read(path, JOINED.replace("\t", delimiter), quotes, on_bad_row="skip")
    assert kept.texts == ["fine film", "well", 'yes"', "last"] and len(kept.skipped) == 1


def test_a_cell_may_have_lines_and_commas(tmp_path: Path) -> None:
    texts = ["Well, a film\nof 2,0 parts, I think", 'so "good",\n\nor 1,2', "plain"]
    with (tmp_path / "q.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([text, 1] for text in texts)])
    rows = read_file(tmp_path / "q.csv", task())
    assert rows.texts == [" ".join(text.split()) for text in texts] and not rows.skipped


def test_the_last_cell_and_two_cells_may_have_lines(tmp_path: Path) -> None:
    rows = read(tmp_path / "q.csv", 'label,text\nham,"Go until\nJurong"\nspam,"Free\n\nentry"\n', SPAM)
    assert rows.texts == ["Go until Jurong", "Free entry"] and not rows.skipped
    pairs = SPAM.model_copy(deep=True)
    pairs.data.columns = {"text": "a", "text_pair": "b", "label": "label"}
    rows = read(tmp_path / "q.csv", 'a,label,b\n"one\ntwo",ham,"three\nfour"\n', pairs)
    assert (rows.texts, rows.pair_texts) == (["one two"], ["three four"])
    line = refused(tmp_path / "q.csv", 'label,text\nham,"oh\nspam,yes"\n', SPAM)
    assert "line 2" in line and "line 3 looks like a row" in line


def test_the_first_row_may_have_lines_and_tabs(tmp_path: Path) -> None:
    config = task(data={"columns": {"text": 0, "label": 1}, "header": False})
    assert read(tmp_path / "q.csv", '"a\nb",1\nc,0\n', config).texts == ["a b", "c"]
    assert read(tmp_path / "q.csv", "a\tb,1\nc,0\n", config).texts == ["a b", "c"]
    assert read(tmp_path / "q.csv", "a, b\t1\nc, d\t0\n", config).texts == ["a, b", "c, d"]


def test_a_bad_byte_in_a_long_cell_costs_the_whole_row(tmp_path: Path) -> None:
    rows = read(tmp_path / "q.csv", b'text,label\n"one\ntw\xe9o\nthree",1\nlast,0\n', on_bad_row="skip")
    assert rows.texts == ["last"]
    assert [str(bad) for bad in rows.skipped] == ["line 2, column byte 3: expected UTF-8, found byte 0xe9 in line 3"]


def test_a_row_of_empty_cells_is_reported(tmp_path: Path) -> None:
    for ending, empty in (("tsv", "\t"), ("csv", ",")):
        content = f"text{empty}label\nfine{empty}1\n{empty}\n\n  \n"
        rows = read(tmp_path / f"q.{ending}", content, on_bad_row="skip")
        assert len(rows) == 1 and [bad.line for bad in rows.skipped] == [3]


def test_an_unclosed_quote_costs_one_row(tmp_path: Path) -> None:
    lines = [f"row {number},0" for number in range(1000)]
    lines[9], lines[20] = '"row ten,0', '"row" twenty,0'
    rows = read(tmp_path / "q.csv", "text,label\n" + "\n".join(lines), on_bad_row="skip")
    assert len(rows) == 998 and [bad.line for bad in rows.skipped] == [11, 22]
    assert all("text after the quote" in bad.reason for bad in rows.skipped)
    assert "reaches line 22" in rows.skipped[0].reason
    rows = read(tmp_path / "q.csv", "text,label\n" + "\n".join(lines[:15]), on_bad_row="skip")
    assert len(rows) == 14 and "reaches line 16: its quote is never closed" in rows.skipped[0].reason


FIVE = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("cell", "settings", "label"),
    [
        ("1", {"label_names": FIVE}, 0),
        ("1.0", {"label_names": FIVE}, 0),
        ("5", {"label_names": FIVE}, 4),
        ("0", {"label_names": FIVE}, None),
        ("good", {"label_names": ["bad", "good"]}, 1),
        ("1", {"label_names": ["bad", "good"]}, 1),
        ("2", {"label_names": ["bad", "good"]}, None),
        ("true", {"num_labels": 2}, 1),
        ("False", {"num_labels": 2}, 0),
        ("true", {"label_names": ["True", "False"]}, 0),
        ("true", {"num_labels": 3}, None),
        ("1_0", {"num_labels": 11}, None),
        ("x", {"label_names": ["x", "y"]}, 0),
    ],
)
def test_one_rule_for_labels(tmp_path: Path, cell: str, settings: dict[str, Any], label: int | None) -> None:
    import pyarrow
    import pyarrow.parquet

    config = task("classification", **settings)
    value: Any = {"true": True, "false": False}.get(cell.lower(), cell)
    if value == cell and cell.replace(".", "").isdigit():
        value = float(cell) if "." in cell else int(cell)
    (tmp_path / "t.csv").write_text(f"text,label\na,{cell}\n")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a", "label": value}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [value]}), tmp_path / "t.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        if label is None:
            with pytest.raises(UserError, match="column label: expected"):
                read_file(tmp_path / f"t.{ending}", config)
        else:
            labels = read_file(tmp_path / f"t.{ending}", config).labels
            assert labels is not None and labels.tolist() == [label], ending


def test_a_boolean_is_no_number(tmp_path: Path) -> None:
    assert "found 'True'" in refused(
        tmp_path / "t.jsonl", '{"text": "a", "label": true}\n', task("regression", range=(0, 1))
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [(b"bad", "binary data"), (["good", "film"], "a list"), ({"en": "x"}, "an object")],
)
def test_cells_that_are_no_text(tmp_path: Path, value: Any, found: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": value, "label": 0}]), path)
    with pytest.raises(UserError, match=f"line 1, column text: expected a text, found {found}"):
        read_file(path, task())
    if not isinstance(value, bytes):
        line = refused(tmp_path / "t.jsonl", json.dumps({"text": value, "label": 0}) + "\n")
        assert f"column text: expected a text, found {found}" in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "good \\ud83d", "label": 1}', "half of a surrogate pair (U+D83D)"),
        ('{"text": "a", "text": "b", "label": 1}', "the key 'text' occurs twice"),
        ('{"text": ' + "[" * 100_000, "column 1"),
        ('{"text": ' + "9" * 5000 + ', "label": 1}', "column 1"),
        ('{"text": NaN, "label": 1}', "expected a text, found none"),
    ],
)
def test_bad_json(tmp_path: Path, line: str, message: str) -> None:
    content = '{"text": "fine", "label": 0}\n' + line + "\n"
    found = refused(tmp_path / "t.jsonl", content)
    assert "line 2" in found and message in found
    assert len(read(tmp_path / "t.jsonl", content, on_bad_row="skip").skipped) == 1


NEWS = '"3","Wall St.","Bears"\n"1","World","News, more"\n'


def test_files_without_a_header(tmp_path: Path) -> None:
    columns = {"text": 1, "label": 0}
    names = ["1", "2", "3", "4"]
    path = tmp_path / "news.csv"
    line = refused(path, NEWS, task("classification", label_names=names, data={"columns": columns}))
    assert "line 1" in line and "header: false" in line
    config = task("classification", label_names=names, data={"columns": columns, "header": False})
    rows = read(path, NEWS, config)
    assert rows.texts == ["Wall St.", "World"] and rows.labels is not None and rows.labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="header: false leaves no names"):
        task(data={"header": False})
    headed = task("classification", label_names=names, data={"columns": columns, "header": True})
    assert len(read(path, NEWS, headed)) == 1


GLUE = {
    "QNLI": ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tnot_entailment\n", ["Who?"], ["He did."], 1),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n",
        ["It rains."],
        ["It is wet."],
        0,
    ),
    "WNLI": ("index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\t1\n", ["It rains."], ["It is wet."], 1),
    "CoLA": ("gj04\t0\t*\tA film good.\n", ["A film good."], None, 0),
}


@pytest.mark.parametrize("name", GLUE)
def test_more_of_glue(tmp_path: Path, name: str) -> None:
    content, texts, pairs, label = GLUE[name]
    rows = read(tmp_path / "train.tsv", content, task(data={"format": "glue", "columns": {}}))
    assert (rows.texts, rows.pair_texts) == (texts, pairs)
    assert rows.labels is not None and rows.labels.tolist() == [label]


def test_an_unknown_column_of_glue_is_refused(tmp_path: Path) -> None:
    config = task(data={"format": "glue", "columns": {}})
    assert "no glue layout" in refused(tmp_path / "t.tsv", "sentence\tcontext\tlabel\na\tb\t1\n", config)


def test_endings_compression_and_pipes(tmp_path: Path) -> None:
    rows = "text,label\nfine,1\n"
    assert read(tmp_path / "A.CSV", rows).texts == ["fine"]
    assert read(tmp_path / "a.txt", rows).texts == ["fine"]
    assert read(tmp_path / "a.csv.gz", gzip.compress(rows.encode())).texts == ["fine"]
    assert read(tmp_path / "A.JSONL", '{"text": "fine", "label": 1}\n').texts == ["fine"]
    assert "no gzip file" in refused(tmp_path / "b.csv.gz", rows)
    assert "damaged" in refused(tmp_path / "b.csv.gz", gzip.compress(rows.encode())[:-6])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(rows))
    writer.start()
    assert read_file(pipe, task()).texts == ["fine"]
    writer.join()
    with pytest.raises(UserError, match="a folder, not a file"):
        read_file(tmp_path, task())


def test_long_cells(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = read(tmp_path / "t.csv", f'text,label\n{"x" * 200_000},1\n"{"y" * 200_000}",0\n')
    assert [len(text) for text in rows.texts] == [200_000] * 2
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("label", ["-1", "", "unknown"])
def test_labels_are_not_read_where_none_are_needed(tmp_path: Path, label: str) -> None:
    content = f"id,text,label\nq1,the cat,{label}\n"
    rows = read(tmp_path / "t.csv", content, require_labels=False)
    assert (rows.texts, rows.labels) == (["the cat"], None)
    assert "expected a class from 0 to 1" in refused(tmp_path / "t.csv", content)


def test_columns_of_the_header(tmp_path: Path) -> None:
    config = task(data={"columns": {**BY_NAME, "id": "key"}})
    assert "no column 'key' for id" in refused(tmp_path / "t.csv", "text,label\na,1\n", config)
    assert "two columns are named 'text'" in refused(tmp_path / "t.csv", "text,text,label\na,b,1\n")
    (note,) = read(tmp_path / "t.csv", "key,text,label\nq,a,1\nq,b,0\n", config).notes
    assert "1 rows have an id that an earlier row has too, the first is 'q' in line 3 and line 2" in note


def test_the_first_line_is_never_replaced_by_the_next(tmp_path: Path) -> None:
    for first in (b"t\xe9xt,label\n", b'"text,label\n'):
        assert "line 1" in refused(tmp_path / "t.csv", first + b"text,label\na,1\n", on_bad_row="skip")
