"""Rows of Hugging Face's datasets: folders, Arrow and Parquet files, objects, names of classes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fastmtl.config import DataConfig, Recipe, TaskConfig
from fastmtl.config.class_weights import class_weights
from fastmtl.data.completion import with_class_names
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.objects import marked, tables
from fastmtl.data.readers import read_file, read_rows
from fastmtl.errors import UserError

datasets = pytest.importorskip("datasets")
COLUMNS = {"text": "text", "label": "label"}
TEXTS, CLASSES, TAGS = ["a b", "c", "d e"], [1, 0, -1], [[0, 1], [1], [0, 0]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a DatasetDict `both`, a Dataset `one` and files of the same rows."""
    folder = tmp_path_factory.mktemp("saved")
    names, tags = datasets.ClassLabel(names=["no", "yes"]), datasets.ClassLabel(names=["O", "B-x"])
    text = datasets.Value("string")
    features = datasets.Features({"text": text, "label": names, "words": [text], "tags": [tags]})
    rows = {"text": TEXTS, "label": CLASSES, "words": [text.split() for text in TEXTS], "tags": TAGS}
    whole = datasets.Dataset.from_dict(rows, features=features)
    first = whole.select([1, 0])  # an order that is not that of the stored rows
    datasets.DatasetDict({"train": first, "validation": whole.select([0])}).save_to_disk(folder / "both")
    whole.save_to_disk(folder / "one")
    for number in range(2):
        first.select([number]).to_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    shutil.copy(folder / "both" / "train" / "data-00000-of-00001.arrow", folder / "stream.arrow")
    table = first.with_format("arrow")[:]
    with pa.OSFile(str(folder / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return folder


def recipe(kind: str, folder: Path, task: dict[str, Any] | None = None, **data: Any) -> Recipe:
    columns = {"words": "words", "label": "tags"} if kind == "tokens" else COLUMNS
    values = {"type": kind, "data": {"columns": columns, **data}, **(task or {})}
    return Recipe.model_validate({"tasks": {"one": values}, "data": {"dir": str(folder)}})


def refused(made: Recipe) -> str:
    with pytest.raises(UserError) as error:
        CorpusRows.read(with_class_names(made))
    (line,) = error.value.lines
    return line


@pytest.mark.parametrize("train", ["both", "both:train", "train-*.parquet", "stream.arrow", "file.arrow"])
def test_every_form_of_the_same_rows(saved: Path, train: str) -> None:
    made = with_class_names(recipe("classification", saved, train=train, dev="both"))
    task = made.tasks["one"]
    assert (task.label_names, task.num_labels) == (["no", "yes"], 2)
    rows = CorpusRows.read(made)
    found, dev = rows.take("one", "train"), rows.take("one", "dev")
    assert found.labels is not None and dev.labels is not None
    assert (list(found.texts), found.labels.tolist(), list(found.ids)) == (["c", "a b"], [0, 1], ["0", "1"])
    assert (list(dev.texts), dev.labels.tolist()) == (["a b"], [1]), "validation is the dev split"


def test_lists_of_classes_are_tags(saved: Path) -> None:
    made = with_class_names(recipe("tokens", saved, train="one"))
    assert made.tasks["one"].label_names == ["O", "B-x"]
    rows = read_rows(made.tasks["one"], made.data, "train")
    assert rows.labels is not None and rows.labels.tolist() == [0, 1, 1, 0, 0]
    without_columns = with_class_names(recipe("tokens", saved, train="one", columns={}))
    assert without_columns.tasks["one"].label_names == ["O", "B-x"], "the column `tags`"
    columns = {"text": "text", "label": "tags"}
    sets = with_class_names(recipe("multilabel", saved, train="both", columns=columns))
    assert sets.tasks["one"].label_names == ["O", "B-x"]
    found = read_rows(sets.tasks["one"], sets.data, "train").labels
    assert found is not None and found.tolist() == [[0, 1], [1, 1]]


def test_names_of_the_recipe_decide_and_are_checked(saved: Path) -> None:
    swapped = recipe("binary", saved, {"label_names": ["yes", "no"]}, train="both")
    assert with_class_names(swapped) is swapped
    rows = CorpusRows.read(swapped).take("one", "train")
    assert rows.labels is not None and rows.labels.tolist() == [1, 0], "a class is known by its name, not its number"
    line = refused(recipe("binary", saved, {"label_names": ["bad", "good"]}, train="both"))
    assert line.startswith(f"{saved / 'both'}:train, column label: the data set has the classes no, yes, and label_n")
    line = refused(recipe("classification", saved, {"num_labels": 3}, train="both"))
    assert line.startswith("tasks.one: ") and line.endswith("label_names has 2 names, num_labels says 3")
    (saved / "plain").mkdir(exist_ok=True)
    pa.parquet.write_table(pa.table({"text": ["a"], "label": [0]}), saved / "plain" / "t.parquet")
    line = refused(recipe("classification", saved, train="plain/*.parquet"))
    assert line.endswith("its labels have no names of classes, so the task needs label_names (or num_labels)")
    with pytest.raises(ValueError, match="a classification task needs num_labels"):
        recipe("classification", saved, train="t.csv")


def test_weights_of_classes_by_the_names_of_the_rows(saved: Path) -> None:
    weighted = with_class_names(recipe("binary", saved, {"class_weights": {"yes": 2.0}}, train="both"))
    assert class_weights(weighted.tasks["one"]) == [1.0, 2.0]
    (saved / "plain").mkdir(exist_ok=True)
    pa.parquet.write_table(pa.table({"text": ["a"], "label": [0]}), saved / "plain" / "t.parquet")
    for train in ("both", "plain/*.parquet"):
        assert "class_weights: 'good' is none of the classes" in refused(
            recipe("binary", saved, {"class_weights": {"good": 2.0}}, train=train)
        )


def test_bad_rows_and_folders(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused(recipe("binary", saved, train="one"))
    assert line.startswith(f"{saved / 'one'}, line 3, column label: expected one of no, yes, found nothing")
    assert "unknown split 'tain'. Did you mean 'train'?" in refused(recipe("binary", saved, train="both:tain"))
    assert "the data set has no splits" in refused(recipe("binary", saved, train="one:train"))
    line = refused(recipe("binary", saved, train="both", dev="one", test="both"))
    assert line.startswith(f"{saved / 'one'}, line 3")
    assert "a folder, not a file" in refused(recipe("binary", saved, train="."))
    no_test = recipe("binary", saved, train="both", test="both").tasks["one"]
    with pytest.raises(UserError, match="has the splits train, validation: name one as both:train"):
        read_rows(no_test, DataConfig(dir=str(saved)), "test")
    (tmp_path / "half.arrow").write_bytes((saved / "stream.arrow").read_bytes()[:300])
    assert "not a readable Arrow file" in refused(recipe("binary", tmp_path, train="half.arrow"))
    shutil.copytree(saved / "one", tmp_path / "broken")
    (tmp_path / "broken" / "data-00000-of-00001.arrow").unlink()
    assert "datasets cannot read this folder" in refused(recipe("binary", tmp_path, train="broken"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(recipe("binary", saved, train="one")).endswith('datasets: pip install "fastmtl-torch[data]"')


def objects() -> dict[str, Any]:
    pandas = pytest.importorskip("pandas")
    rows: list[dict[str, Any]] = [{"text": "a b", "label": 1}, {"text": "c", "label": 0}]
    return {
        "list": rows,
        "tuple": tuple(rows),
        "frame": pandas.DataFrame({"text": ["a b", "c"], "label": [1.0, 0.0]}, index=[7, 7]),
        "dataset": datasets.Dataset.from_list(rows).with_format("numpy"),
    }


@pytest.mark.parametrize("kind", ["list", "tuple", "frame", "dataset"])
def test_objects_of_a_program(kind: str) -> None:
    found = tables({"one": {"train": objects()[kind], "validation": [{"text": "d", "label": True}]}}, ["one"])
    values = {"tasks": {"one": {"type": "binary", "data": {"columns": COLUMNS}}}}
    made = Recipe.model_validate(marked(values, found))
    rows = CorpusRows.read(made, found)
    train, dev = rows.take("one", "train"), rows.take("one", "dev")
    assert (list(train.texts), list(dev.texts), list(train.ids)) == (["a b", "c"], ["d"], ["0", "1"])
    assert train.labels is not None and train.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="the train rows were objects of a Python program: call fastmtl.train"):
        CorpusRows.read(made)


def test_missing_cells_of_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", None], "label": [1, 0], "list": [["x"], None]})
    (table,) = tables({"one": {"train": frame}}, ["one"]).values()
    assert [row for batch in table.batches() for row in batch] == [
        {"text": "a", "label": 1, "list": ["x"]},
        {"text": None, "label": 0, "list": None},
    ]
    with pytest.raises(UserError, match=r"data\['one'\]\['train'\], line 2, column text: expected a text, found none"):
        read_file(table, TaskConfig.model_validate({"type": "binary", "data": {"columns": COLUMNS}}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"two": {}}, "data: unknown task 'two'"),
        ({"one": [1]}, "data['one']: expected {'train': rows, 'dev': rows}, found list"),
        ({"one": {"tests": []}}, "data['one']: unknown split 'tests'"),
        ({"one": {"train": []}}, "data['one']['train']: no rows"),
        ({"one": {"train": "rows.csv"}}, "data['one']['train']: expected a datasets.Dataset, a pandas.DataFrame or"),
        ({"one": {"train": [{"text": "a"}, 3]}}, "found list with int"),
        ({"one": {"dev": [{"text": "a"}], "validation": [{"text": "a"}]}}, "the same split: leave out one of both"),
        (3, "data: expected {task: {split: rows}}, found int"),
    ],
)
def test_objects_that_are_no_rows(data: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        tables(data, ["one"])
    assert message in str(error.value)
