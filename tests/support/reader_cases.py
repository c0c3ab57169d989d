"""Inputs that once failed, by name: files, and the register that test_cases.py runs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmtl.config import TaskConfig
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError

Case = Callable[[Path, Path], None]
CASES: dict[str, Case] = {}


def case(*names: str) -> Callable[[Case], Case]:
    """Register a function of (an empty folder, a small BERT) under the names of its inputs."""

    def register(function: Case) -> Case:
        CASES.update(dict.fromkeys(names, function))
        return function

    return register


def task(kind: str = "binary", **values: Any) -> TaskConfig:
    data = {"columns": {"text": "text", "label": "label"}, **values.pop("data", {})}
    return TaskConfig.model_validate({"type": kind, "data": data, **values})


def read(file: Path, content: str | bytes, config: TaskConfig | None = None, **how: Any) -> Rows:
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return read_file(file, config or task(), **how)


def refused(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        act()
    for word in words:
        assert word in str(caught.value)


JOINED = 'text\tlabel\n"oh\t1\nfine film\t0\nwell\t0\nyes"\t1\nlast\t0\n'


@case("A02")
def a_quote_that_does_not_close_in_its_row(folder: Path, _: Path) -> None:
    assert read(folder / "q.tsv", JOINED).texts == ['"oh', "fine film", "well", 'yes"', "last"]


@case("A02c")
def quotes_of_csv_over_several_rows(folder: Path, _: Path) -> None:
    refused(lambda: read(folder / "q.tsv", JOINED, task(data={"quotes": "csv"})), "line 2", "looks like a row")


@case("A02b")
def quotes_within_a_text(folder: Path, _: Path) -> None:
    rows = read(folder / "q.tsv", 'text\tlabel\n"great film" they said\t1\n')
    assert rows.texts == ['"great film" they said']


@case("A03")
def an_unclosed_quote_with_skipping(folder: Path, _: Path) -> None:
    lines = [f"row {n},{n % 2}" for n in range(1000)]
    lines[9] = '"row ten,0'
    rows = read(folder / "q.csv", "text,label\n" + "\n".join(lines) + "\n", on_bad_row="skip")
    assert (len(rows), len(rows.skipped)) == (999, 1)


@case("A01")
def names_of_labels_that_are_numbers(folder: Path, _: Path) -> None:
    config = task("classification", label_names=["1", "2", "3", "4", "5"])
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), folder / "a.parquet")
    found = [
        read(folder / "a.csv", "text,label\na,1\n", config),
        read(folder / "b.csv", "text,label\na,1.0\n", config),
        read(folder / "a.jsonl", '{"text": "a", "label": 1}\n', config),
        read_file(folder / "a.parquet", config),
    ]
    assert [rows.labels.tolist() for rows in found if rows.labels is not None] == [[0]] * 4
    five = read(folder / "five.jsonl", '{"text": "a", "label": 5}\n', config)
    assert five.labels is not None and five.labels.tolist() == [4]


@case("A07")
def pairs_of_glue(folder: Path, _: Path) -> None:
    config = task(
        "classification", label_names=["entailment", "not_entailment"], data={"format": "glue", "columns": {}}
    )
    rows = read(folder / "q.tsv", "index\tquestion\tsentence\tlabel\n0\twho?\the\tentailment\n", config)
    assert (rows.texts, rows.pair_texts) == (["who?"], ["he"])


@case("A08")
def a_binary_column(folder: Path, _: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"bad"], pa.binary()), "label": [1]}), folder / "a.parquet")
    refused(lambda: read_file(folder / "a.parquet", task()), "column text")


@case("A08d", "A09")
def lists_and_objects_as_texts(folder: Path, _: Path) -> None:
    pq.write_table(pa.table({"text": [["good", "film"]], "label": [1]}), folder / "a.parquet")
    refused(lambda: read_file(folder / "a.parquet", task()), "column text")
    for value in (["good", "film"], {"en": "x"}):
        line = json.dumps({"text": value, "label": 1})
        refused(lambda line=line: read(folder / "a.jsonl", line + "\n"), "line 1, column text")  # type: ignore[misc]


@case("A06")
def a_file_without_a_header(folder: Path, _: Path) -> None:
    data = {"columns": {"text": 1, "label": 0}}
    rows = '"3","Wall St.","Bears"\n"1","World","Talks"\n'
    names = ["1", "2", "3", "4"]
    refused(lambda: read(folder / "a.csv", rows, task("classification", label_names=names, data=data)), "header: false")
    config = task("classification", label_names=names, data={**data, "header": False})
    assert read(folder / "a.csv", rows, config).texts == ["Wall St.", "World"]


@case("A04", "C17")
def rows_without_labels(folder: Path, _: Path) -> None:
    for label in ("-1", ""):
        rows = read(folder / "a.csv", f"text,label\nthe cat,{label}\n", require_labels=False)
        assert (rows.texts, rows.skipped) == (["the cat"], [])


@case("A10", "C35")
def half_of_a_surrogate_pair(folder: Path, _: Path) -> None:
    lines = '{"text": "good \\ud83d", "label": 1}\n{"text": "fine", "label": 1}\n'
    refused(lambda: read(folder / "a.jsonl", lines), "line 1, column text")
    rows = read(folder / "a.jsonl", lines, on_bad_row="skip")
    assert (rows.texts, len(rows.skipped)) == (["fine"], 1)


@case("A05")
def a_long_cell(folder: Path, _: Path) -> None:
    assert read(folder / "a.csv", f"text,label\n{'x' * 200_000},1\n").texts == ["x" * 200_000]


@case("A12")
def other_endings(folder: Path, _: Path) -> None:
    rows = "text,label\na,1\n"
    assert read(folder / "a.CSV", rows).texts == ["a"]
    assert read(folder / "a.JSONL", '{"text": "a", "label": 1}\n').texts == ["a"]
    assert read(folder / "a.csv.gz", gzip.compress(rows.encode())).texts == ["a"]
