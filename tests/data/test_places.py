"""The places of a split's rows: several files, patterns, and a share of the training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtl.config import DataConfig, Recipe, TaskConfig
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.readers import read_rows
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError
from fastmtl.inference.selection import check_early_stopping
from fastmtl.model.merge import task_values
from fastmtl.training.early_checks import check_recipe


def task(kind: str = "binary", **data: Any) -> TaskConfig:
    columns = {"text": "text", "label": "label"}
    more: dict[str, Any] = {"regression": {"range": (0, 9)}, "classification": {"num_labels": 3}}
    return TaskConfig.model_validate({"type": kind, "data": {"columns": columns, **data}, **more.get(kind, {})})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of three files: 2 rows of CSV, 3 of TSV, 2 JSON lines."""
    (tmp_path / "a.csv").write_text("text,label\none,1\ntwo,0\n")
    (tmp_path / "b.tsv").write_text("label\ttext\n1\tthree\n0\tfour\n1\tfive\n")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t, "label": 1}) + "\n" for t in ("six", "seven")))
    return tmp_path


def read(folder: Path, train: Any, **data: Any) -> Rows:
    return read_rows(task(train=train), DataConfig.model_validate({"dir": str(folder), **data}), "train")


def refused(folder: Path, train: Any, **data: Any) -> str:
    with pytest.raises(UserError) as error:
        read(folder, train, **data)
    (line,) = error.value.lines
    return line


def test_files_follow_one_another(folder: Path) -> None:
    rows = read(folder, ["b.tsv", "c.jsonl", "a.csv"])
    assert rows.texts == ["three", "four", "five", "six", "seven", "one", "two"]
    assert rows.ids == list("0123456"), "without an id, the position over all files"
    assert rows.labels is not None and rows.labels.tolist() == [1, 0, 1, 1, 1, 1, 0]
    assert str(rows.path) == f"{folder / 'b.tsv'} and 2 more"
    assert read(folder, "[ac].*").texts == ["one", "two", "six", "seven"], "patterns in the order of the names"
    assert read(folder, ["c.jsonl", str(folder / "*.tsv")]).texts[:3] == ["six", "seven", "three"]
    limited = task(train=["b.tsv", "a.csv"], limit=4)
    assert read_rows(limited, DataConfig(dir=str(folder)), "train").texts == ["three", "four", "five", "one"]
    assert len(read_rows(limited, DataConfig(dir=str(folder), fraction=0.6), "train")) == 3


def test_a_name_with_the_signs_of_a_pattern_is_a_file(folder: Path) -> None:
    (folder / "a[1].csv").write_text("text,label\neight,1\n")
    assert read(folder, "a[1].csv").texts == ["eight"]


def test_bad_rows_name_their_file(folder: Path) -> None:
    (folder / "d.csv").write_text("text,label\nnine,1\nten,2\n")
    assert refused(folder, ["a.csv", "d.csv"]).startswith(f"{folder / 'd.csv'}, line 3, column label: ")
    rows = read(folder, ["a.csv", "d.csv", "b.tsv"], on_bad_row="skip")
    assert len(rows.skipped) == 1 and rows.ids == list("012456")


def test_names_that_lead_nowhere(folder: Path) -> None:
    assert refused(folder, "parts/*.csv") == f"{folder / 'parts/*.csv'}: no file matches this pattern"
    assert "named twice" in refused(folder, ["a.*", "a.csv"])
    (folder / "empty.csv").write_text("text,label\n")
    assert refused(folder, ["a.csv", "empty.csv"]) == f"{folder / 'empty.csv'}: no rows"
    for given in ([], ["a.csv", 3]):
        with pytest.raises(ValueError, match="give the name of a file, or a list of names"):
            task(train=given)


def test_a_split_has_pairs_or_not(folder: Path) -> None:
    (folder / "pairs.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tentailment\n")
    (folder / "texts.tsv").write_text("sentence\tlabel\na\t1\n")
    glue = task(format="glue", columns={}, train=["pairs.tsv", "texts.tsv"])
    with pytest.raises(UserError, match=r"texts.tsv has one text per row and .*pairs.tsv has two"):
        read_rows(glue, DataConfig(dir=str(folder)), "train")


def write(folder: Path, rows: int) -> None:
    lines = [f"word {number},{0 if number % 5 else 1 + number % 2}" for number in range(rows)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_dev_rows_are_a_share_of_the_training_rows(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 103)
    data = DataConfig(dir=str(tmp_path), dev_fraction=0.2)
    config = task(kind, train="rows.csv")
    train, dev = (read_rows(config, data, split) for split in ("train", "dev"))
    assert len(dev) == 21 and len(train) == 82
    assert not set(train.texts) & set(dev.texts) and not set(train.ids) & set(dev.ids)
    assert dev.notes == ["21 of 103 training rows are the dev rows (data.dev_fraction=0.2, seed 1)"]
    assert [int(row) for row in dev.ids] == sorted(int(row) for row in dev.ids)
    assert dev.labels is not None and [f"word {row}" for row in dev.ids] == dev.texts
    if kind == "classification":  # 82, 10 and 11 rows of a class
        counts = np.bincount(dev.labels, minlength=3)
        assert counts[0] in (16, 17) and counts[1] in (2, 3) and counts[2] in (2, 3)
    another = data.model_copy(update={"dev_seed": 2})
    assert read_rows(config, another, "dev").ids != dev.ids
    fewer = data.model_copy(update={"fraction": 0.5})
    assert read_rows(config, fewer, "dev").ids == dev.ids and set(read_rows(config, fewer, "train").ids) < set(
        train.ids
    )
    own = config.model_copy(update={"data": config.data.model_copy(update={"dev_fraction": 0.1, "dev_seed": 2})})
    assert len(read_rows(own, data, "dev")) == 10 and "0.1, seed 2" in read_rows(own, data, "dev").notes[0]


def test_the_corpus_reads_both_splits_at_once(tmp_path: Path) -> None:
    write(tmp_path, 20)
    values = {
        "tasks": {"one": task(train="rows.csv", columns={"text": "text", "label": "label"}).model_dump()},
        "data": {"dir": str(tmp_path), "dev_fraction": 0.25, "drop_longest": 0.2, "on_bad_row": "skip"},
        "early_stopping": {"patience": 1},
    }
    recipe = Recipe.model_validate(values)
    check_early_stopping(recipe)
    rows = CorpusRows.read(recipe)
    assert rows.sizes == {("one", "train"): 12, ("one", "dev"): 4}
    train, dev = rows.take("one", "train"), rows.take("one", "dev")
    assert len(train.skipped) == 2 and not dev.skipped, "each bad row is counted once"
    assert "4 of 18 training rows" in dev.notes[0] and train.notes == ["2 of 14 rows left out, the longest"]


def test_two_sources_of_dev_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dev_fraction: 0.1: the task has dev files too"):
        task(train="a.csv", dev="b.csv", dev_fraction=0.1)
    both = {"tasks": {"one": task(train="a.csv", dev="b.csv").model_dump()}, "data": {"dev_fraction": 0.1}}
    with pytest.raises(UserError, match=r"data.dev_fraction: 0.1: all tasks have dev files"):
        check_recipe(Recipe.model_validate(both), 1)
    write(tmp_path, 2)
    with pytest.raises(UserError, match="dev_fraction=0.9 leaves none of 2 rows to train on"):
        read_rows(task("classification", train="rows.csv"), DataConfig(dir=str(tmp_path), dev_fraction=0.9), "train")


def test_a_merged_model_finds_the_files_of_both(tmp_path: Path) -> None:
    first, second = (
        Recipe.model_validate({"tasks": {"one": task(train=train, dev="d.csv").model_dump()}, "data": {"dir": name}})
        for train, name in (("a.csv", "here"), (["b.csv", "/c/*.csv"], str(tmp_path)))
    )
    data = task_values("one", first, second)["data"]
    assert (data["train"], data["dev"]) == ([str(tmp_path / "b.csv"), "/c/*.csv"], str(tmp_path / "d.csv"))
    assert task_values("one", first, first)["data"]["train"] == "a.csv"
