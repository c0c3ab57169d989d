"""The corpus of conflicting tasks: the same bytes each time, and the degree that was asked."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import make_conflict_corpus as corpus
from fastmtl.config import load_recipe


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def group(text: str, groups: list[list[str]]) -> int:
    """Return the number of the only group that has words of the text."""
    (number,) = {number for number, words in enumerate(groups) if set(words) & set(text.split())}
    return number


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    found = []
    for seed in (1, 1, 2):
        corpus.write_corpus(folder, 0.5, seed)
        corpus.write_encoder(folder / "encoder", seed)
        found.append(bytes_of(folder))
    assert found[0] == found[1]
    assert {name for name in found[0] if found[0][name] != found[2][name]} == {
        "encoder/model.safetensors",
        *(f"{task}-{split}.tsv" for task in corpus.ROWS for split in ("train", "dev")),
    }


@pytest.mark.parametrize("conflict", [0.0, 0.25, 1.0])
def test_the_degree_is_the_share_of_pairs_that_disagree(tmp_path: Path, conflict: float) -> None:
    corpus.write_corpus(tmp_path, conflict)
    for task, groups, other in (
        ("topic", corpus.TOPICS, corpus.STYLES),
        ("style", corpus.STYLES, corpus.TOPICS),
    ):
        for split, number in zip(("train", "dev"), corpus.ROWS[task], strict=True):
            with (tmp_path / f"{task}-{split}.tsv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
            disagreeing = 0
            for row in rows:
                same = group(row["text"], groups) == group(row["text_pair"], groups)
                assert row["label"] == str(corpus.HIGHEST[task] * same)
                disagreeing += same != (group(row["text"], other) == group(row["text_pair"], other))
            assert len(rows) == number and disagreeing == conflict * number


def test_the_recipe_is_valid_and_the_verdict_is_in_the_words(tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path / "a b", 1.0)
    assert load_recipe(str(tmp_path / "a b" / "recipe.yaml")).task_names == ["topic", "style", "verdict"]
    with (tmp_path / "a b" / "verdict-train.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            assert list(corpus.VERDICTS)[group(row["text"], list(corpus.VERDICTS.values()))] == row["label"]
