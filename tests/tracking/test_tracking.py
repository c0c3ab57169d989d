"""metrics.jsonl: content, full precision, and equal files of resumed and uninterrupted runs."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.tracking import Tracker
from fastmtl.tracking.display import LineDisplay, scores_table, summarize
from fastmtl.tracking.metrics_file import read_metrics

DEV = {"sst": {"accuracy": 0.5, "macro_f1": 0.4}, "sts": {"pearson": 0.7, "spearman": 0.6, "mse": 1.0}}


@dataclass
class Info:
    losses: dict[str, Any]
    cosines: torch.Tensor | None = None
    conflict_rate: float | None = None
    task_norms: object = field(default=None)
    merged_norm: float | None = None
    skipped: str | None = None
    seconds: float = 0.0
    nbytes: int = 0


def recipe(**train: Any) -> Recipe:
    tasks = {
        "sst": {"type": "classification", "num_labels": 5, "data": {}},
        "sts": {"type": "regression", "range": [0, 5], "data": {}},
    }
    return Recipe.model_validate({"tasks": tasks, "train": train})


def info(step: int) -> Info:
    value = torch.tensor(1.0 / 3 / step, dtype=torch.float32)
    cosines = torch.tensor([[1.0, -0.25], [-0.25, 1.0]])
    skipped = "task sts" if step == 2 else None
    norms = torch.tensor([2.0, 3.0])
    return Info({"sst": value, "sts": float(value) / 7}, cosines, 1.0, norms, 2.5, skipped, 0.25, 24)


def run(output: Path, first: int, last: int, resume: int = 0, total: int = 6) -> str:
    out = io.StringIO()
    tracker = Tracker(output, recipe(), total, resume, console=Console(file=out, width=200))
    for step in range(first, last + 1):
        tracker.step(step, (step - 1) // 3, info(step), {"encoder": 1e-4}, tokens=100)
        if step % 3 == 0:
            tracker.evaluation(step, (step - 1) // 3, DEV, 0.6)
    tracker.close()
    return out.getvalue()


def comparable(output: Path) -> list[dict]:
    varying = ("time", "tokens_per_second", "surgery_seconds")
    return [{k: v for k, v in line.items() if k not in varying} for line in read_metrics(output / "metrics.jsonl")]


def test_lines_hold_what_is_promised(tmp_path: Path) -> None:
    run(tmp_path, 1, 3)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    keys = {"step", "epoch", "loss", "lr", "cosines", "conflict_rate", "task_norms", "merged_norm", "skipped"}
    assert set(lines[0]) == keys | {"surgery_bytes", "surgery_seconds", "tokens_per_second", "time"}
    assert lines[0]["skipped"] is None and lines[1]["skipped"] == "task sts"
    assert lines[0]["surgery_seconds"] == 0.25 and lines[0]["surgery_bytes"] == 24
    assert lines[0]["cosines"] == {"sst/sts": -0.25}
    assert lines[0]["task_norms"] == {"sst": 2.0, "sts": 3.0}
    assert lines[0]["lr"] == {"encoder": 1e-4}
    assert lines[0]["tokens_per_second"] > 0
    assert lines[3]["dev"] == DEV
    assert lines[3]["mean"] == 0.6


def test_losses_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path, 1, 6)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        if "loss" in line:
            expected = float(info(line["step"]).losses["sst"])
            assert struct.pack("d", line["loss"]["sst"]) == struct.pack("d", expected)


def test_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 1, 6)
    run(parts, 1, 5)  # killed after step 5; the checkpoint is from step 4
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(parts, 5, 6, resume=4)
    assert comparable(parts) == comparable(whole)
    assert not list(parts.glob(".*"))


def test_an_evaluation_that_is_repeated_after_a_resume_is_written_once(tmp_path: Path) -> None:
    run(tmp_path, 1, 3)
    tracker = Tracker(tmp_path, recipe(), 6, 3, console=Console(file=io.StringIO()))
    tracker.evaluation(3, 0, DEV, 0.6)
    tracker.close()
    assert [line["step"] for line in comparable(tmp_path) if "dev" in line] == [3]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    run(tmp_path, 1, 3)
    run(tmp_path, 1, 1)
    assert [line["step"] for line in comparable(tmp_path)] == [1]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, recipe(), 2, console=Console(file=io.StringIO()))
    cosines = torch.tensor([[1.0, math.nan], [math.nan, 1.0]])
    tracker.step(1, 0, Info({"sst": math.inf}, cosines), 1e-4, 10)
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] == {"sst": None}
    assert line["cosines"] == {"sst/sts": None}
    assert line["task_norms"] == {}


def test_only_logged_steps_read_values(tmp_path: Path) -> None:
    class Untouchable:
        def __float__(self) -> float:
            raise AssertionError("a value was read in a step that is not logged")

    tracker = Tracker(tmp_path, recipe(log_every=2), 5, console=Console(file=io.StringIO()))
    for step in range(1, 6):
        logged = step in (2, 4, 5)
        tracker.step(step, 0, info(step) if logged else Info({"sst": Untouchable()}), 1e-4, 10)
    tracker.close()
    assert [line["step"] for line in comparable(tmp_path)] == [2, 4, 5]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", recipe(), 2, is_main=False)
    tracker.step(1, 0, info(1), 1e-4, 10)
    tracker.evaluation(1, 0, DEV, 0.6)
    tracker.message("hello")
    tracker.scores(DEV, 0.6)
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_losses_and_dev_scores(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 1, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/sst")] == [1, 2, 3]
    assert events.Scalars("loss/sst")[0].value == pytest.approx(1 / 3)
    assert events.Scalars("cosines/sst/sts")[0].value == -0.25
    assert events.Scalars("dev/sts/pearson")[0].value == pytest.approx(0.7)
    assert events.Scalars("dev/mean")[0].value == pytest.approx(0.6)


def test_a_log_file_gets_the_first_and_the_last_step_and_every_evaluation(tmp_path: Path) -> None:
    lines = run(tmp_path, 1, 6).splitlines()
    assert lines[0].startswith("epoch 1  step 1/6  sst 0.333  sts 0.048  conflicts 100 %")
    assert lines[-2].startswith("epoch 2  step 6/6")
    assert [line for line in lines if "dev:" in line] == [
        "epoch 1  step 3  dev: sst accuracy 0.500  sts pearson 0.700  mean 0.600",
        "epoch 2  step 6  dev: sst accuracy 0.500  sts pearson 0.700  mean 0.600",
    ]
    assert len(lines) == 4


def test_lines_come_at_most_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastmtl.tracking.display.time.monotonic", lambda: now[0])
    out = io.StringIO()
    display = LineDisplay(Console(file=out), 100)
    for step in range(1, 23):
        now[0] = float(step)
        display.update(step, 0, "x")
    assert len(out.getvalue().splitlines()) == 5


def test_scores_of_many_metrics_are_listed_per_task() -> None:
    values = {"task": {"type": "span", "data": {}}, "sst": {"type": "classification", "num_labels": 5, "data": {}}}
    metrics = {"task": {"f1": 0.9, "exact_match": 0.5, "roc_auc": 0.25}, "sst": {**DEV["sst"], "map": 0.125, "x": 1.0}}
    out = io.StringIO()
    Console(file=out, width=80).print(scores_table(Recipe.model_validate({"tasks": values}), metrics, 0.7, "scores"))
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in out.getvalue().splitlines()]
    assert ["", "task", "F1", "0.900", "exact match 0.500, ROC AUC 0.250", ""] in lines
    assert ["", "sst", "accuracy", "0.500", "macro F1 0.400, mAP 0.125, x 1.000", ""] in lines


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    tracker = Tracker(tmp_path, recipe(), 2, console=console)
    for step in (1, 2):
        tracker.step(step, 0, info(step), 1e-4, 10)
    tracker.scores(DEV, 0.6)
    tracker.close()
    text = out.getvalue()
    assert "2/2" in text
    assert "tokens/s" in text
    assert "dev scores" in text


def test_summary_and_table() -> None:
    assert summarize({"a": 1.0}, None, 2449.0) == "a 1.000  2.4k tokens/s"
    out = io.StringIO()
    Console(file=out, width=100).print(scores_table(recipe(), DEV, 0.6, "dev scores"))
    lines = out.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert rows == [
        ["sst", "0.500", "0.400", "", ""],
        ["sts", "", "", "0.700", "0.600"],
    ]
    assert lines[-1].strip() == "mean 0.600 (sst accuracy, sts pearson)"


def test_lines_are_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line's numbers are read when it is written; until then nothing waits for a GPU."""
    read: list[int] = []

    class Late(Info):
        @property
        def seconds(self) -> float:
            read.append(1)
            return 0.25

        @seconds.setter
        def seconds(self, value: float) -> None: ...

    now = [100.0]
    monkeypatch.setattr("fastmtl.tracking.tracker.time.monotonic", lambda: now[0])
    tracker = Tracker(tmp_path, recipe(), 100, console=Console(file=io.StringIO()))
    steps = []
    for step in range(1, 7):
        tracker.step(step, 0, Late({"sst": 0.5}), 1e-4, tokens=10)
        now[0] += 0.4
        steps.append((len(read_metrics(tmp_path / "metrics.jsonl")), len(read)))
    assert steps == [(1, 1), (1, 1), (1, 1), (4, 4), (4, 4), (4, 4)]
    tracker.flush()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens_per_second"] for line in lines[1:]] == [25.0] * 5
    tracker.close()
