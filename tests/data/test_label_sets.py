"""Sets of labels in files: separated cells, lists and indicator columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError

NAMES = ["red", "blue", "dark green"]
SETS = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def task(columns: dict[str, Any] | None = None, **values: Any) -> TaskConfig:
    values = {"label_names": NAMES, **values}
    files = {"columns": columns or {"text": "text", "label": "labels"}, **values.pop("data", {})}
    return TaskConfig.model_validate({"type": "multilabel", "data": files, **values})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def assert_sets(rows: Rows, expected: list[list[int]] = SETS) -> None:
    assert rows.labels is not None and rows.labels.dtype == np.float32
    assert rows.labels.tolist() == expected


def test_every_kind_of_file(tmp_path: Path) -> None:
    csv = write(tmp_path / "a.csv", 'text,labels\none,"red, dark green"\ntwo,\nthree,blue\n')
    assert_sets(read_file(csv, task()))
    tsv = write(tmp_path / "a.tsv", "text\tlabels\none\t0; 2\ntwo\t\nthree\t1\n")  # numbers are labels, too
    assert_sets(read_file(tsv, task(multilabel={"separator": ";"})))
    values: list[Any] = [["red", "dark green"], [], "blue"]
    lines = [json.dumps({"text": "a", "labels": value}) for value in values]
    assert_sets(read_file(write(tmp_path / "a.jsonl", "\n".join(lines)), task()))
    assert_sets(read_file(write_parquet(tmp_path / "a.parquet", text=["a"] * 3, labels=[[0, 2], [], [1]]), task()))


def test_columns_named_text_and_id_need_no_mapping(tmp_path: Path) -> None:
    rows = read_file(write(tmp_path / "a.csv", "id,text,labels\nx,one,red\n"), task({"label": "labels"}))
    assert list(rows.ids) == ["x"] and list(rows.texts) == ["one"]


def test_indicator_columns(tmp_path: Path) -> None:
    columns = {"text": "text", "label": NAMES}
    config = task(columns, label_names=None)
    assert config.label_names == NAMES and config.num_labels == 3
    csv = write(tmp_path / "a.csv", "text,blue,red,dark green\na,0,1,true\nb,0,0,FALSE\nc,1.0,0,0\n")
    assert_sets(read_file(csv, config))
    flags = {name: [bool(row[label]) for row in SETS] for label, name in enumerate(NAMES)}
    assert_sets(read_file(write_parquet(tmp_path / "a.parquet", text=["a"] * 3, **flags), config))
    numbers = task({"text": 0, "label": [2, 1, 3]}, data={"header": False})
    csv.write_text("a,0,1,1\nb,0,0,0\nc,1,0,0\n")
    assert_sets(read_file(csv, numbers))
    with pytest.raises(UserError, match="line 1: the columns are numbers, and this line could be a row"):
        read_file(csv, task({"text": 0, "label": [2, 1, 3]}))
    assert read_file(csv, numbers, require_labels=False).labels is None


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("red,pink", "line 3, column labels: expected one of red, blue, dark green, found 'pink'"),
        ("red,,blue", "line 3, column labels: expected one of .*, found an empty label"),
        ("red, 0", "line 3, column labels: the label 'red' occurs twice"),
    ],
)
def test_bad_cells(tmp_path: Path, cell: str, message: str) -> None:
    path = write(tmp_path / "a.csv", f'text,labels\na,red\nb,"{cell}"\nc,\n')
    with pytest.raises(UserError, match=f"a.csv, {message}"):
        read_file(path, task())
    assert_sets(read_file(path, task(), on_bad_row="skip"), [[1, 0, 0], [0, 0, 0]])


def test_bad_indicators_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,red,blue,dark green\na,1,0,0\nb,1,,0\n")
    config = task({"text": "text", "label": NAMES})
    with pytest.raises(UserError, match="line 3, column blue: expected 0, 1, true or false, found nothing"):
        read_file(path, config)
    path.write_text("text,red,blue\na,1,0\n")
    with pytest.raises(UserError, match="no column 'dark green' for label; the file has text, red, blue"):
        read_file(path, config)
    lines = write(tmp_path / "a.jsonl", '{"text": "a", "labels": [["red"]]}')
    with pytest.raises(UserError, match=r"line 1, column labels: expected one of .*, found .*\['red'\]"):
        read_file(lines, task())


def test_a_quoted_line_with_labels_looks_like_a_row(tmp_path: Path) -> None:
    """An empty cell does not: it would be one in any text that ends with a comma."""
    for end, bad in (("red", True), ("", False)):
        path = write(tmp_path / "a.csv", f'labels,text\nblue,"a\n{end},b"\nblue,c\n')
        if bad:
            with pytest.raises(UserError, match="line 3 looks like a row of its own"):
                read_file(path, task())
        else:
            assert len(read_file(path, task())) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_names": None}, "needs label_names, its labels"),
        ({"columns": {"text": 0, "label": [1, 2]}, "label_names": None}, "give the labels' names in label_names"),
        ({"columns": {"text": "t", "label": ["a", "b"]}}, "label_names has 3 names for the 2 columns"),
        ({"columns": {"text": "t", "label": ["a", "a"]}, "label_names": None}, "name each column once"),
        ({"label_names": ["a,b", "c"]}, "'a,b' contains ',', .* set multilabel.separator"),
        ({"multilabel": {"thresholds": [0.5]}}, "has 1 numbers for 3 labels"),
        ({"multilabel": {"thresholds": 1.0}}, "less than 1"),
        ({"type": "classification", "columns": {"text": "t", "label": NAMES}}, "several columns are for .* multilabel"),
    ],
)
def test_refused_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(**values)
