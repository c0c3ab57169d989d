"""Files of predictions, read by other libraries."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scored import scored

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.inference.predictions import write_cs224n, write_table
from fastmtl.inference.types import INFERENCE_TYPES

NAMED = TaskConfig.model_validate({"type": "classification", "label_names": ["bad", "so, so"], "data": {}})
CLASSES = TaskConfig.model_validate({"type": "classification", "num_labels": 3, "data": {}})
BINARY = TaskConfig.model_validate({"type": "binary", "data": {}})
REGRESSION = TaskConfig.model_validate({"type": "regression", "range": [0, 5], "data": {}})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_probabilities_beside_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_table(path, CLASSES, scored(np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]]), ids=["x", "y"]))
    assert read(path) == [
        {"id": "x", "predicted": "1", "p_0": "0.100000", "p_1": "0.700000", "p_2": "0.200000"},
        {"id": "y", "predicted": "0", "p_0": "0.500000", "p_1": "0.250000", "p_2": "0.250000"},
    ]
    write_table(path, BINARY, scored(np.array([0.75]), ids=["x"]))
    assert read(path) == [{"id": "x", "predicted": "1", "p_0": "0.250000", "p_1": "0.750000"}]
    write_table(path, REGRESSION, scored(np.array([3.25]), ids=["x"]))
    assert read(path) == [{"id": "x", "predicted": "3.250000"}]
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


def test_table_survives_names_and_ids_with_commas_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_table(path, NAMED, scored(np.array([[0.2, 0.8]]), ids=['a "b", c']))
    assert read(path) == [{"id": 'a "b", c', "predicted": "so, so", "p_bad": "0.200000", "p_so, so": "0.800000"}]


def test_a_table_is_written_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    written: list[int] = []

    def lines(fails: bool) -> Iterator[list[str]]:
        for number in range(3000):
            yield [str(number), "x" * 100]
            written.append((tmp_path / ".out.csv.tmp").stat().st_size)
        if fails:
            raise RuntimeError("the scores are broken")

    monkeypatch.setitem(INFERENCE_TYPES, "binary", SimpleNamespace(table=lambda *_: (["id", "text"], lines(True))))
    with pytest.raises(RuntimeError, match="the scores are broken"):
        write_table(path, BINARY, scored(np.array([0.5])))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.csv"]
    assert 0 < written[1500] < written[-1] < 3000 * 110
    monkeypatch.setitem(INFERENCE_TYPES, "binary", SimpleNamespace(table=lambda *_: (["id", "text"], lines(False))))
    write_table(path, BINARY, scored(np.array([0.5])))
    assert len(path.read_text().splitlines()) == 3001


def test_cs224n_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_cs224n(path, CLASSES, scored(np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]]), ids=["a1", "a2"]))
    assert path.read_text() == "id \t Predicted_Sentiment \na1 , 1 \na2 , 0 \n"
    write_cs224n(path, BINARY, scored(np.array([0.2]), ids=["a1"]))
    assert path.read_text() == "id \t Predicted_Is_Paraphrase \na1 , 0 \n"
    write_cs224n(path, REGRESSION, scored(np.array([2.5]), ids=["a1"]))
    assert path.read_text() == "id \t Predicted_Similiary \na1 , 2.500000 \n"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*absent/out\.csv: No such file"):
        write_table(tmp_path / "absent" / "out.csv", BINARY, scored(np.array([0.5]), ids=["x"]))
