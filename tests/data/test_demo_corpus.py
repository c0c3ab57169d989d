"""The shipped corpus: its script's output, train and dev disjoint, hard for a bag of words."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import demo_labels
from fastmtl.data.baseline import bag_of_words_score, complaints_score, entities_score
from fastmtl.data.corpus import demo_directory

SCRIPT = Path(__file__).parents[2] / "tools" / "make_demo_corpus.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo_corpus"] = module
    spec.loader.exec_module(module)
    return module


def test_script_makes_the_shipped_files(maker: ModuleType, tmp_path: Path) -> None:
    maker.make(tmp_path)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 10
    for path in made:
        assert path.read_bytes() == (demo_directory() / path.name).read_bytes()


@pytest.mark.parametrize("task", ["sentiment", "paraphrase", "similarity"])
def test_train_and_dev_share_no_sentence(task: str) -> None:
    def texts(split: str) -> set[str]:
        with (demo_directory() / f"{task}-{split}.csv").open(encoding="utf-8", newline="") as stream:
            return {text for row in list(csv.reader(stream, delimiter="\t"))[1:] for text in row[2:-1]}

    assert not texts("train") & texts("dev")


def test_train_and_dev_share_no_labelled_text() -> None:
    for task, ending, rows in (("entities", "conll", 1000), ("complaints", "csv", 1600)):
        texts: dict[str, list[str]] = {}
        for split in ("train", "dev"):
            lines = (demo_directory() / f"{task}-{split}.{ending}").read_text(encoding="utf-8").splitlines()
            if ending == "csv":
                texts[split] = [row["text"] for row in csv.DictReader(lines)]
            else:
                texts[split] = "\n".join(line for line in lines if not line.startswith("#")).split("\n\n")
        assert [len(texts["train"]), len(texts["dev"])] == [rows, 200]
        assert len({*texts["train"], *texts["dev"]}) == rows + 200


@pytest.mark.parametrize(
    "name",
    ["SENTIMENT", "CLAIMS", "STATEMENTS", "ENTITIES", "PRAISE", "BLAME", "REVISED_PRAISE", "REVISED_BLAME", "JOINED"],
)
def test_train_and_dev_share_no_template(maker: ModuleType, name: str) -> None:
    templates = getattr(maker, name, None) or getattr(demo_labels, name)
    assert not set(templates["train"]) & set(templates["dev"])


@pytest.mark.parametrize(("task", "ceiling"), [("sentiment", 0.60), ("paraphrase", 0.75), ("similarity", 0.70)])
def test_bag_of_words_stays_low(task: str, ceiling: float) -> None:
    score = bag_of_words_score(demo_directory() / f"{task}-train.csv", demo_directory() / f"{task}-dev.csv", task)  # type: ignore[arg-type]
    assert score <= ceiling


def test_linear_models_of_labelled_texts_stay_low() -> None:
    train, dev = (demo_directory() / f"entities-{split}.conll" for split in ("train", "dev"))
    assert entities_score(train, dev, neighbours=0) <= 0.40
    assert entities_score(train, dev, neighbours=1) <= 0.70
    assert complaints_score(*(demo_directory() / f"complaints-{split}.csv" for split in ("train", "dev"))) <= 0.65
