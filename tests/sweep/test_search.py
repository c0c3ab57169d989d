"""Searches with Optuna: the space, the budget, pruning, a stop and its continuation, the page."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.sweep import search
from fastmtl.sweep.child_process import end_with_parent
from fastmtl.sweep.command import run_sweep
from fastmtl.sweep.grid import Point
from fastmtl.sweep.runs import FAILED, INTERRUPTED, OK
from fastmtl.sweep.search import Budget, Search
from fastmtl.sweep.space import Space
from fastmtl.sweep.trials import Running, ended_at_errors

pytest.importorskip("optuna")
# A program in the place of the launcher. It writes a run's files: the mean of an evaluation grows
# with the learning rate, rates from 0.5 on fail, and 0.45 has no mean. It ends at SIGTERM, as a
# run does.
TRAINING = """
import json, pathlib, signal, sys, time
import yaml
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
place = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
rate = yaml.safe_load((place / "recipe.yaml").read_text())["optimizer"]["lr"]
if rate >= 0.5:
    sys.exit("fastmtl: the training diverged")
with (place / "metrics.jsonl").open("a") as file:
    for epoch in range(4):
        mean = None if rate == 0.45 else rate + epoch / 100
        file.write(json.dumps({"step": epoch, "dev": {"one": {"accuracy": rate}}, "mean": mean}) + "\\n")
        file.flush()
        last_of_pruned = epoch == 3 and 0.05 < rate < 0.15
        time.sleep(20 * PAUSE if last_of_pruned else PAUSE)
(place / "results.json").write_text(json.dumps(
    {"dev": {"one": {"accuracy": rate}}, "mean": mean, "steps": 4, "seconds": 1.0}))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    tasks = {"one": {"type": "binary", "data": {"train": "train.tsv", "dev": "dev.tsv"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return str(tmp_path / "recipe.yaml")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "POLL", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def launcher(tmp_path: Path, pause: float = 0.0) -> list[str]:
    file = tmp_path / "training.py"
    file.write_text(TRAINING.replace("PAUSE", str(pause)))
    return [sys.executable, str(file)]


def grid(tmp_path: Path, values: Any) -> Path:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "space.yaml"


def table(output: Path) -> list[dict[str, str]]:
    with (output / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


RATE = {"optimizer.lr": {"low": 1e-3, "high": 0.4, "log": True}, "engine.zero": [0, 1]}


def test_a_search_ends_after_its_trials_and_goes_on_with_more(tmp_path: Path, recipe: str) -> None:
    output, file = tmp_path / "a b?c#d%41", grid(tmp_path, RATE)
    assert run_sweep(recipe, file, [], output, launcher(tmp_path), Budget(3)) == OK
    first = table(output)
    assert len(first) == 3 and (output / "study.db").is_file()
    assert run_sweep(recipe, file, [], output, launcher(tmp_path), Budget(8, parallel=3)) == OK
    rows = table(output)
    assert len(rows) == 8 and all(row in rows for row in first)
    means = [float(row["mean"]) for row in rows if row["mean"]]
    assert means == sorted(means, reverse=True)
    page = (output / "sweep.html").read_text()
    assert ">trial</text>" in page or "<!-- trial -->" in page
    assert "optimizer.lr" in page and "Settings that matter" in page
    with pytest.raises(UserError, match="has a search of engine.zero, optimizer.lr"):
        run_sweep(recipe, grid(tmp_path, {"seed": [1, 2]}), [], output, launcher(tmp_path), Budget(9))
    with pytest.raises(UserError, match="has a search with other values of engine.zero: choose another place"):
        run_sweep(recipe, grid(tmp_path, {**RATE, "engine.zero": [1]}), [], output, launcher(tmp_path), Budget(9))
    with pytest.raises(UserError, match="has a search with train.epochs: 1, now 5: choose another place"):
        run_sweep(recipe, grid(tmp_path, RATE), ["train.epochs=5"], output, launcher(tmp_path), Budget(9))


def test_trials_with_low_scores_are_pruned_and_failures_are_told(tmp_path: Path, recipe: str) -> None:
    """The first four trials end; then a trial below the median of their scores is stopped."""
    output = tmp_path / "sweep"
    rates = {"optimizer.lr": {"low": 0.001, "high": 0.7}}
    assert (
        run_sweep(recipe, grid(tmp_path, rates), [], output, launcher(tmp_path, 0.05), Budget(10, parallel=2)) == FAILED
    )
    errors = [row["error"] for row in table(output)]
    assert any(error.startswith("pruned after") for error in errors)
    assert any(error == "failed with status 1: the training diverged" for error in errors)


def test_equal_trials_have_folders_of_their_own_or_are_not_repeated(tmp_path: Path, recipe: str) -> None:
    """Two equal trials that run at the same time have a folder each; a third one ends at once."""
    output = tmp_path / "sweep"
    rates = grid(tmp_path, {"optimizer.lr": [0.1]})
    assert run_sweep(recipe, rates, [], output, launcher(tmp_path), Budget(3, parallel=2)) == OK
    assert len(list(output.glob("points/*"))) == 2
    assert [row["mean"] for row in table(output)] == ["0.1300"] * 3


def test_a_trial_without_a_mean_has_failed(tmp_path: Path, recipe: str) -> None:
    rates = grid(tmp_path, {"optimizer.lr": [0.45]})
    assert run_sweep(recipe, rates, [], tmp_path / "sweep", launcher(tmp_path), Budget(1)) == FAILED
    (row,) = table(tmp_path / "sweep")
    assert row["error"] == "failed: there is no mean dev score: a metric is not a number"


def test_values_that_the_recipe_cannot_have(tmp_path: Path, recipe: str) -> None:
    """A value that is always invalid is refused; one that is so in some trials fails these."""
    space = grid(tmp_path, {"engine.clip": {"low": -1.0, "high": 1.0}})
    with pytest.raises(UserError, match=r"space.yaml, engine.clip=-1.0: .*greater than or equal to 0"):
        run_sweep(recipe, space, [], tmp_path / "sweep", launcher(tmp_path), Budget(2))
    assert not (tmp_path / "sweep").exists()
    together = {"weighting.name": ["dwa", "fixed"], "weighting.temperature": [1.0, 3.0]}
    found = Search(tmp_path / "s", recipe, [], Space(space, together), Budget(1), launcher(tmp_path), print)
    (tmp_path / "s").mkdir()
    found._study().enqueue_trial({"weighting.name": '"fixed"', "weighting.temperature": "3.0"})
    (result,), status = found.run()
    assert status == FAILED and result.error.startswith("failed: ") and "weighting.name: dwa" in result.error


def test_a_file_that_is_no_study(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "study.db").write_text("x" * 5000)
    with pytest.raises(UserError, match=r"study.db cannot be opened as a study of Optuna: .*not a database"):
        run_sweep(recipe, grid(tmp_path, RATE), [], tmp_path, launcher(tmp_path), Budget(1))


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path: Path, recipe: str) -> None:
    program = "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(f, fcntl.LOCK_EX)"
    words = [sys.executable, "-c", f"{program}; print(flush=True); sys.stdin.read()", str(tmp_path / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="another run is writing to "):
            run_sweep(recipe, grid(tmp_path, RATE), [], tmp_path, launcher(tmp_path), Budget(1))


def test_a_run_ends_with_its_sweep(tmp_path: Path) -> None:
    """The process of a run ends when that of the sweep is killed, and when the sweep fails."""
    reading, writing = os.pipe()
    sweep = os.fork()
    if not sweep:
        run = subprocess.Popen(["sleep", "60"], preexec_fn=end_with_parent)
        os.write(writing, f"{run.pid}\n".encode())
        signal.pause()
    run_id = int(os.read(reading, 20))
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    status = Path(f"/proc/{run_id}/stat")
    deadline = time.monotonic() + 30
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process = subprocess.Popen(["sleep", "60"])
    point = Point({}, Recipe.model_validate({"tasks": {"one": {"type": "binary", "data": {"train": "x.csv"}}}}))
    with pytest.raises(ZeroDivisionError), ended_at_errors([Running(None, 1, point, process, tmp_path, 0)]):
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGTERM


def test_a_stop_leaves_running_trials_to_the_next_call(tmp_path: Path, recipe: str) -> None:
    output, file = tmp_path / "sweep", grid(tmp_path, RATE)

    def stop() -> None:
        while not list(output.glob("points/*/metrics.jsonl")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert run_sweep(recipe, file, [], output, launcher(tmp_path, 5.0), Budget(2)) == INTERRUPTED
    (begun,) = output.glob("points/*")
    assert not (begun / "results.json").exists()
    assert run_sweep(recipe, file, [], output, launcher(tmp_path), Budget(2)) == OK
    assert (begun / "results.json").is_file()
    assert [row["error"] for row in table(output)] == ["", ""] and len(list(output.glob("points/*"))) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "give a list of values or a distribution like"),
        ([], "give a list"),
        ({"low": 1}, "give a list"),
        ({"low": 0.0, "high": 1.0, "log": True}, "with log or step above 0"),
        ({"low": 2, "high": 1}, "low is below high"),
        ({"low": 1, "high": 8, "log": True, "step": 2}, "log and step exclude each other"),
        ({"low": "1", "high": 2}, "are numbers"),
        ({"low": 1, "high": float("inf")}, "both finite"),
    ],
)
def test_bad_distributions_name_the_key(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"space.yaml: optimizer.lr: .*{message}"):
        Space(tmp_path / "space.yaml", {"optimizer.lr": given})


def test_choices_may_be_any_value(tmp_path: Path) -> None:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    space = Space(tmp_path / "s.yaml", {"adapter": [{"name": "pal"}, None], "x": {"low": 1, "high": 9, "step": 2}})
    categorical, whole = space.distributions.values()
    assert isinstance(categorical, CategoricalDistribution) and isinstance(whole, IntDistribution)
    assert [space.settings({"adapter": choice})["adapter"] for choice in categorical.choices] == [{"name": "pal"}, None]


def test_distributions_need_a_budget(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(UserError, match="space.yaml: a grid with distributions is searched: .*--trials N"):
        run_sweep(recipe, grid(tmp_path, RATE), [], tmp_path / "sweep")
