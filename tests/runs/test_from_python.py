"""A run that a Python program starts: the same as with the rows in files; its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from results_only import results_only

import fastmtl
from fastmtl.engine.distributed import Ranks, leave
from fastmtl.errors import UserError
from fastmtl.training.prepare import check_same_rows

ROWS = [
    {"text": f"the {a} dog {b}", "label": int(a == "good")} for a in ("good", "dull") for b in ("ran", "sat", "ate")
]


def recipe(folder: Path, encoder: Path, **data: Any) -> dict[str, Any]:
    task = {"type": "binary", "data": {"columns": {"text": "text", "label": "label"}, **data}}
    return {
        "encoder": {"path": str(encoder)},
        "adapter": {"name": "low_rank", "size": 4},
        "data": {"dir": str(folder), "cache_dir": str(folder / "cache")},
        "tasks": {"one": task},
        "sampler": {"batch_size": 2},
        "train": {"epochs": 1, "max_steps": 2},
    }


@pytest.fixture
def group_ended() -> Iterator[None]:
    """End the process group that a run of this process leaves."""
    yield
    leave()


@pytest.mark.slow(4)
@pytest.mark.usefixtures("group_ended")
def test_objects_and_files_give_the_same_run(tmp_path: Path, tiny_bert: Path) -> None:
    for split, rows in (("train", ROWS), ("dev", ROWS[1:5])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with results_only():
        of_files = fastmtl.train(recipe(tmp_path, tiny_bert, train="train.jsonl", dev="dev.jsonl"), tmp_path / "files")
        given = {"one": {"train": ROWS, "dev": ROWS[1:5]}}
        of_objects = fastmtl.train(recipe(tmp_path, tiny_bert), tmp_path / "objects", data=given, overrides=["seed=1"])
    for name in ("model/model.safetensors", "predictions/one-dev.csv"):
        assert (of_files / name).read_bytes() == (of_objects / name).read_bytes(), name
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (of_files, of_objects)]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in steps]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    for run in (of_files, of_objects):  # the folder is free again
        with pytest.raises(UserError, match="resume"):
            fastmtl.train(recipe(tmp_path, tiny_bert), run, data=given)
    with pytest.raises(UserError, match="call fastmtl.train"):
        fastmtl.train(of_objects / "config.yaml", tmp_path / "again")


def test_arguments(tmp_path: Path, tiny_bert: Path) -> None:
    for arguments, message in (
        ({"recipe": {}}, "output: name the folder of the run"),
        ({"recipe": 3, "output": tmp_path / "a"}, "recipe: expected a name, a path, a dictionary or"),
        ({"recipe": "demo", "output": tmp_path / "a", "accept_changes": True}, "accept_changes needs resume"),
        ({"recipe": "demo", "output": tmp_path / "a", "data": {"x": {}}}, "data: unknown task 'x'"),
        ({"recipe": "demo", "output": tmp_path / "a", "overrides": ["train.epoch=1"]}, "Did you mean 'train.epochs'"),
    ):
        with pytest.raises(UserError) as error:
            fastmtl.train(**arguments)
        assert message in str(error.value)
    assert not (tmp_path / "a").exists()


def test_processes_need_the_same_rows() -> None:
    class Two(Ranks):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, {**value, "one dev": "other"}]

    import torch

    two = Two(0, 2, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="the rows of one dev differ between ranks 0 and 1"):
        check_same_rows(two, {"one train": "a", "one dev": "b"})
    check_same_rows(two, {"one train": "a", "one dev": "other"})
