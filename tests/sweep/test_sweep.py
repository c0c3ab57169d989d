"""Sweeps: the grid, runs and skipped runs, the table and the plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmtl.errors import UserError
from fastmtl.sweep import runs
from fastmtl.sweep.child_process import Interrupted
from fastmtl.sweep.command import run_sweep
from fastmtl.sweep.grid import read_grid
from fastmtl.sweep.runs import FAILED, INTERRUPTED, OK


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: Path) -> str:
    rows = {"train": 12, "dev": 6}
    for split, number in rows.items():
        text = "\n".join(f"the cat {row}\t{row % 2}" for row in range(number))
        (tmp_path / f"{split}.tsv").write_text(f"text\tlabel\n{text}\n")
    data = {"train": "train.tsv", "dev": "dev.tsv", "columns": {"text": "text", "label": "label"}}
    values = {
        "encoder": {"path": str(tiny_bert)},
        "data": {"dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")},
        "tasks": {"one": {"type": "binary", "data": data}},
        "train": {"max_steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def grid(tmp_path: Path, values: Any) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_mapping_is_every_combination_and_a_list_is_its_points(tmp_path: Path, recipe: str) -> None:
    text = (
        "optimizer.lr: [1e-5, 3.0e-5]\ntasks.one.head.dropout: [0.1]\nadapter: [{name: none}, {name: lora, size: 2}]\n"
    )
    points = read_grid(grid(tmp_path, text), recipe, ["optimizer.lr=7", "seed=4"])
    seen = [(point.recipe.optimizer.lr, point.recipe.adapter.name, point.recipe.seed) for point in points]
    assert seen == [(1e-5, "none", 4), (1e-5, "lora", 4), (3e-5, "none", 4), (3e-5, "lora", 4)]
    assert all(point.recipe.tasks["one"].head.dropout == 0.1 for point in points)
    assert len({point.folder for point in points}) == 4 and points[0].folder.startswith("lr=1e-05_dropout=0.1_adapter=")
    listed = read_grid(grid(tmp_path, [{"seed": 1, "train.epochs": 2}, {"seed": 2, "train.epochs": 1}]), recipe)
    assert [(point.recipe.seed, point.recipe.train.epochs) for point in listed] == [(1, 2), (2, 1)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer.rate": [1]}, "unknown key 'optimizer.rate'"),
        ({"optimizer.lr": [1e-4, -1]}, "point optimizer.lr=-1: "),
        ({"optimizer.lr": 1e-4}, "optimizer.lr: a list of values is needed, got 0.0001"),
        ({"seed": [1, 1]}, "the point seed=1 is there twice"),
        ([{"seed": 1}, {"train.epochs": 1}], "every point has to give the same settings"),
        ({}, "a grid is a mapping like"),
        ("a: [", "not a YAML file"),
        ("seed: [2020-01-01]", "seed: datetime.date(2020, 1, 1) is no setting: give numbers, text"),
        ("- {seed: 1, description: 2020-01-01 10:00:00}", "description: datetime.datetime("),
        ("optimizer.lr: [.inf]", "optimizer.lr: inf is no setting"),
        ("data.dir: [!!binary aGk=]", "data.dir: b'hi' is no setting"),
        ("deepspeed: [&a {b: *a}]", "deepspeed: {'b': {...}} is no setting"),
    ],
)
def test_mistakes_in_a_grid_are_told_before_anything_runs(
    tmp_path: Path, recipe: str, values: Any, message: str
) -> None:
    with pytest.raises(UserError) as error:
        run_sweep(recipe, grid(tmp_path, values), [], tmp_path / "sweep")
    assert message in str(error.value) and not (tmp_path / "sweep").exists()


class Trained:
    """Replace the processes: write a run's files; seeds above 90 fail, seed 80 is stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        monkeypatch.setattr(runs, "run_fastmtl", self)

    def __call__(self, *arguments: str, command: Any, log: Path) -> int:
        assert arguments[0] == "train" and arguments[2] == "--output" and arguments[4] == "--resume"
        place = Path(arguments[3])
        values = yaml.safe_load(Path(arguments[1]).read_text())
        seed = values["seed"]
        self.seeds.append(seed)
        if seed == 80 and self.seeds.count(80) == 1:
            raise Interrupted
        if seed > 90:
            log.write_text("epoch 1\nfastmtl: tasks.one: no | such file\n")
            return 2
        log.write_text("all well\n")
        (place / "checkpoints").mkdir()
        mean = seed / 100 + values["optimizer"]["lr"]
        dev = {"one": {"accuracy": mean, "macro_f1": 0.0}}
        (place / "results.json").write_text(json.dumps({"dev": dev, "mean": mean, "steps": 3, "seconds": 1.25}))
        return 0


def test_a_failed_point_is_noted_and_finished_ones_are_skipped(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, output = Trained(monkeypatch), tmp_path / "sweep"
    values: dict[str, list[Any]] = {"seed": [10, 95, 30], "optimizer.lr": [0.0, 0.001]}
    assert run_sweep(recipe, grid(tmp_path, values), [], output) == FAILED
    assert trained.seeds == [10, 10, 95, 95, 30, 30]
    rows = list(csv.DictReader((output / "sweep.csv").open(newline="")))
    assert [(row["seed"], row["optimizer.lr"], row["mean"]) for row in rows[:4]] == [
        ("30", "0.001", "0.3010"),
        ("30", "0", "0.3000"),
        ("10", "0.001", "0.1010"),
        ("10", "0", "0.1000"),
    ]
    assert rows[0]["one accuracy"] == "0.3010" and rows[0]["steps"] == "3" and rows[0]["error"] == ""
    assert all(row["error"] == "failed with status 2: tasks.one: no | such file" for row in rows[4:])
    lines = (output / "sweep.md").read_text().splitlines()
    assert lines[0] == "| seed | optimizer.lr | one accuracy | mean | steps | seconds | error |" and len(lines) == 8
    assert "no \\| such file" in lines[-1]
    svg = (output / "sweep.svg").read_text()
    assert "<svg" in svg and svg.count('id="axes_') == 2
    assert not list(output.glob("points/*/checkpoints"))
    capsys.readouterr()

    values["seed"].append(40)  # the grid may grow; failed runs are repeated
    assert run_sweep(recipe, grid(tmp_path, values), [], output) == FAILED
    assert trained.seeds[6:] == [95, 95, 40, 40]
    assert "10" in capsys.readouterr().out

    with pytest.raises(UserError, match="is a run with train.epochs: 1, now 2"):
        run_sweep(recipe, grid(tmp_path, values), ["train.epochs=2"], output)


def test_a_stop_leaves_a_table_and_the_same_command_goes_on(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, output = Trained(monkeypatch), tmp_path / "sweep"
    file = grid(tmp_path, {"seed": [10, 80, 20]})
    assert run_sweep(recipe, file, [], output) == INTERRUPTED
    assert trained.seeds == [10, 80]
    rows = list(csv.DictReader((output / "sweep.csv").open(newline="")))
    assert [row["error"] for row in rows] == ["", "not run yet", "not run yet"]
    assert run_sweep(recipe, file, [], output) == OK
    assert trained.seeds == [10, 80, 80, 20]


@pytest.mark.slow(10)
def test_real_processes(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "sweep"
    file = grid(tmp_path, {"tasks.one.data.train": ["train.tsv", "absent.tsv"]})
    assert run_sweep(recipe, file, [], output) == FAILED
    good, bad = csv.DictReader((output / "sweep.csv").open(newline=""))
    assert good["steps"] == "1" and 0 <= float(good["mean"]) <= 1
    assert bad["error"].startswith("failed with status 2: ") and "absent.tsv: no such file" in bad["error"]
    assert list(output.glob("points/*/model/model.safetensors"))


def test_a_launcher_is_not_wrapped_around_the_sweep(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = grid(tmp_path, {"seed": [1]})
    with pytest.raises(UserError, match="there is no command deepsped"):
        run_sweep(recipe, file, [], tmp_path / "sweep", ["deepsped"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="name it with --launcher"):
        run_sweep(recipe, file, [], tmp_path / "sweep")
