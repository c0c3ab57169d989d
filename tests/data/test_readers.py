"""Readers: every layout, and an error message for every kind of bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file
from fastmtl.errors import UserError


def task(kind: str = "classification", **data: Any) -> TaskConfig:
    values: dict[str, Any] = {"type": kind, "data": {"format": "cs224n", **data}}
    if kind == "classification":
        values["num_labels"] = 5
    if kind == "regression":
        values["range"] = (0, 5)
    return TaskConfig.model_validate(values)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_cs224n_sentences(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sst.csv", '\tid\tsentence\tsentiment\n0\ta1\t  A  fine film . \t3\n1\ta2\t"So ""good"" ."\t4\n'
    )
    rows = read_file(path, task())
    assert rows.ids == ["a1", "a2"] and rows.pair_texts is None
    assert rows.texts == ["A fine film .", 'So "good" .']
    assert rows.labels is not None and rows.labels.dtype == np.int64 and rows.labels.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("column", "kind", "label"), [("is_duplicate", "binary", "1.0"), ("similarity", "regression", "4.6")]
)
def test_cs224n_pairs(tmp_path: Path, column: str, kind: str, label: str) -> None:
    path = write(tmp_path / "pairs.csv", f"\tid\tsentence1\tsentence2\t{column}\n0\tx\tOne.\tTwo.\t{label}\n")
    rows = read_file(path, task(kind))
    assert (rows.texts, rows.pair_texts) == (["One."], ["Two."])
    assert rows.labels is not None and rows.labels.dtype == np.float32
    assert rows.labels[0] == pytest.approx(float(label))


GLUE = {
    "sst2": ('sentence\tlabel\nan unquoted " mark\t1\n', "binary", ['an unquoted " mark'], None, 1),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tWhy?\tHow?\t0\n",
        "binary",
        ["Why?"],
        ["How?"],
        0,
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t5.000\n",
        "regression",
        ["A plane."],
        ["An air plane."],
        5,
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe said.\tHe spoke.\n",
        "binary",
        ["He said."],
        ["He spoke."],
        1,
    ),
    "mnli": (
        "index\tpromptID\tpairID\tsentence1\tsentence2\tgold_label\n0\t1\t1n\tIt rains.\tIt is wet.\tneutral\n",
        "classification",
        ["It rains."],
        ["It is wet."],
        1,
    ),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue(tmp_path: Path, name: str) -> None:
    text, kind, texts, pair_texts, label = GLUE[name]
    rows = read_file(write(tmp_path / f"{name}.tsv", text), task(kind, format="glue"))
    assert (rows.texts, rows.pair_texts) == (texts, pair_texts)
    assert rows.labels is not None and rows.labels.tolist() == [label]


def test_tables_by_column_mapping(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [
        {"n": "1", "one": "A cat, indeed", "two": "A dog", "y": "0"},
        {"n": "2", "one": "x", "two": "y", "y": "1"},
    ]
    write(tmp_path / "t.csv", 'n,one,two,y\n1,"A cat, indeed",A dog,0\n2,x,y,1\n')
    write(tmp_path / "t.tsv", "n\tone\ttwo\ty\n1\tA cat, indeed\tA dog\t0\n2\tx\ty\t1\n")
    write(tmp_path / "t.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "t.parquet")
    columns = {"id": "n", "text": "one", "text_pair": "two", "label": "y"}
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        rows = read_file(tmp_path / f"t.{ending}", task("binary", format="table", columns=columns))
        assert (rows.ids, rows.texts, rows.pair_texts) == (["1", "2"], ["A cat, indeed", "x"], ["A dog", "y"])
        assert rows.labels is not None and rows.labels.tolist() == [0, 1]
    by_index = read_file(tmp_path / "t.csv", task("binary", format="table", columns={"text": 1, "label": 3}))
    assert by_index.texts == ["A cat, indeed", "x"]


def test_label_names(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "text,label\nfine,good\npoor,bad\n")
    config = TaskConfig.model_validate(
        {
            "type": "classification",
            "label_names": ["bad", "good"],
            "data": {"format": "table", "columns": {"text": "text", "label": "label"}},
        }
    )
    labels = read_file(path, config).labels
    assert labels is not None and labels.tolist() == [1, 0]


HEADER = "\tid\tsentence\tsentiment\n"
BAD = {
    "no text": (b"0\ta\t  \t3\n", "line 3, column sentence: expected a text"),
    "no label": (b"0\ta\tA film\t\n", "line 3, column sentiment: expected a class from 0 to 4, found nothing"),
    "not a number": (b"0\ta\tA film\tgreat\n", "line 3, column sentiment: expected a class from 0 to 4, found 'great'"),
    "out of range": (b"0\ta\tA film\t5\n", "line 3, column sentiment: expected a class from 0 to 4, found '5'"),
    "half a class": (b"0\ta\tA film\t1.5\n", "line 3, column sentiment: expected a class from 0 to 4, found '1.5'"),
    "few columns": (b"0\ta\tA film\n", "line 3, column sentiment: expected 4 columns, found 3"),
    "many columns": (b"0\ta\tA film\t3\tx\n", "line 3, column 5: expected 4 columns, found 5"),
    "encoding": (b"0\ta\tA f\xe9lm\t3\n", "line 3, column byte 8: expected UTF-8, found byte 0xe9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_or_skipped(tmp_path: Path, name: str) -> None:
    bad, message = BAD[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(HEADER.encode() + b"0\tgood\tfine\t1\n" + bad + b"1\tgood2\tfine too\t2\n")
    with pytest.raises(UserError) as error:
        read_file(path, task())
    assert str(path) in str(error.value) and message in str(error.value)
    rows = read_file(path, task(), on_bad_row="skip")
    assert rows.ids == ["good", "good2"] and len(rows.skipped) == 1
    assert message.startswith(f"line 3, column {rows.skipped[0].column}")


@pytest.mark.parametrize("value", ["-0.1", "5.1", "nan", "inf", "many"])
def test_regression_labels_lie_in_the_range(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "sts.csv", f"\tid\tsentence1\tsentence2\tsimilarity\n0\tx\tOne.\tTwo.\t{value}\n")
    with pytest.raises(UserError, match="expected a number from 0 to 5"):
        read_file(path, task("regression"))


def test_line_numbers_count_lines_inside_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HEADER + '0\ta\t"two\nlines"\t1\n1\tb\tbad\t9\n')
    with pytest.raises(UserError, match="line 4, column sentiment"):
        read_file(path, task())


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("", task(), "the file is empty"),
        (HEADER, task(), "no rows"),
        ("a\tb\n1\t2\n", task(), "is no cs224n layout. Known: id, sentence, sentiment"),
        ("a,b\n1,2\n", task(format="table"), "needs data.columns"),
        (
            "a,b\n1,2\n",
            task(format="table", columns={"text": "c", "label": "b"}),
            "no column 'c' for text; the file has a, b",
        ),
        ("x", task(format="cs224m"), "unknown data format 'cs224m'. Did you mean 'cs224n'?"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, config: TaskConfig, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_file(write(tmp_path / "t.csv", text), config)
    assert message in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "none.csv", task())


def test_unlabelled_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "test.csv", "\tid\tsentence\n0\tx\tA film.\n")
    assert read_file(path, task(), require_labels=False).labels is None
    with pytest.raises(UserError, match="no column 'sentiment' for label"):
        read_file(path, task())
