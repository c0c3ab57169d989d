"""Trackers of other libraries, offline: their files have the numbers of a run and of its resume."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.tracking import Tracker
from fastmtl.tracking import backends as table
from fastmtl.tracking.backends import Backend, check_tracking
from fastmtl.tracking.metrics_file import read_metrics


class Info:
    cosines = conflict_rate = task_norms = merged_norm = skipped = None
    seconds, nbytes = 0.0, 0

    def __init__(self, loss: float) -> None:
        self.losses = {"sst": loss}


def recipe(*names: str) -> Recipe:
    tasks = {"sst": {"type": "binary", "data": {"train": "x.csv"}}}
    return Recipe.model_validate({"tasks": tasks, "tracking": list(names)})


def run(output: Path, name: str, first: int, last: int, resume: int = 0) -> str:
    """Track the steps `first` to `last`, an evaluation after the last; return the printed lines."""
    shown = io.StringIO()
    tracker = Tracker(output, recipe(name), 4, resume, console=Console(file=shown, width=200))
    for step in range(first, last + 1):
        tracker.step(step, 0, Info(1 / step), {"encoder": 1e-4}, 10)
    tracker.evaluation(last, 0, {"sst": {"accuracy": 0.5 + last / 10}}, 0.5)
    tracker.close()
    return shown.getvalue()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # restored after the test
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "reviews"
    run(output, "mlflow", 1, 2)
    run(output, "mlflow", 2, 4, resume=1)
    client = mlflow.MlflowClient(tracking_uri=(output / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("fastmtl")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "reviews" and found.info.status == "FINISHED"
    assert found.data.params["engine/zero"] == "1" and found.data.params["tasks/sst/type"] == "binary"
    losses = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "loss/sst")}
    assert losses == pytest.approx({1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4})
    assert found.data.metrics["dev/sst/accuracy"] == pytest.approx(0.9)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = tmp_path / "reviews"
    run(output, "wandb", 1, 2)
    run(output, "wandb", 2, 4, resume=1)
    files = sorted((output / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two parts of one run
    content = b"".join(file.read_bytes() for file in files)
    for name in (b"loss/sst", b"dev/sst/accuracy", b"0.9", b"gradient"):
        assert name in content


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    folder = tmp_path / "trackio"
    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    output = tmp_path / "reviews"
    run(output, "trackio", 1, 2)
    run(output, "trackio", 3, 4, resume=2)
    (base,) = folder.glob("*.db")
    with sqlite3.connect(base) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert {step for step, _ in rows} == {1, 2, 3, 4}
    assert any("dev/sst/accuracy" in str(metrics) for _, metrics in rows)


def test_a_missing_library_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracking: wandb needs its library: pip install wandb"):
        check_tracking(recipe("wandb"))
    check_tracking(recipe())
    with pytest.raises(UserError, match="tracking: wandb, wandb: name each library once"):
        check_tracking(recipe("wandb", "wandb"))


def test_a_run_goes_on_without_a_library_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Backend):
        def __init__(self, *arguments: Any) -> None:
            self.steps = 0

        def log(self, step: int, values: Mapping[str, float]) -> None:
            self.steps += 1
            if self.steps == 2:
                raise ConnectionError("no route\nto host")

        def close(self) -> None:
            raise AssertionError("a library that failed is used again")

    monkeypatch.setattr("fastmtl.tracking.tracker.open_backend", lambda *arguments: Broken())
    shown = run(tmp_path, "wandb", 1, 4)
    assert shown.count("tracking: wandb failed and is left out from here on: no route to host") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]


def test_a_library_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.BACKENDS, "wandb", ("absent", "Absent", "wandb", "wandb"))
    with pytest.raises(UserError, match="tracking: wandb did not start: .*absent"):
        Tracker(tmp_path, recipe("wandb"), 4, console=Console(file=io.StringIO()))
