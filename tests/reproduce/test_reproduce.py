"""`fastmtl reproduce`: its plan, its tables, and resuming after a stop."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from launch import cpu_environment

from fastmtl.errors import UserError
from fastmtl.reproduce.command import run_report
from fastmtl.reproduce.plan import Options, describe, plan
from fastmtl.reproduce.report import as_json, lines_of, markdown
from fastmtl.reproduce.runs import Outcome
from fastmtl.reproduce.tables import PaperResults, Table, load_results, reports, value_of
from fastmtl.training.phases import phases_of

SCORES = {"sst": {"accuracy": 0.5}, "para": {"accuracy": 0.7}, "sts": {"pearson": -0.2}}


def outcome(seed: int, sts: float) -> Outcome:
    dev = {"sst": {"accuracy": 0.5}, "sts": {"pearson": sts}}
    return Outcome(seed, dev, {}, 60.0, 9, "a" * 40, True, "2026-01-01T00:00:00+00:00")


def test_columns() -> None:
    train = {"sst": {"accuracy": 0.9}}
    assert value_of("sst/accuracy", SCORES, train) == 0.5
    assert value_of("train:sst/accuracy", SCORES, train) == 0.9
    assert value_of("train:sts/pearson", SCORES, train) is None
    assert value_of("mean", SCORES, {}) == pytest.approx((0.5 + 0.7 - 0.2) / 3)
    assert value_of("leaderboard", SCORES, {}) == pytest.approx((0.5 + 0.7 + 0.4) / 3)
    assert value_of("mean", {"sst": {"accuracy": 0.5}}, {}) is None


@pytest.mark.parametrize("report", reports())
def test_printed_means_are_those_of_the_printed_scores(report: str) -> None:
    """Numbers and formula are the report's, except for two rows whose printed mean differs."""
    slips = {"Basic PAL, d_s = 256", "Low rank + PALs on top", "Low rank + PALs on top, CLS pooling"}
    checked = 0
    for table in load_results(report).tables:
        names = list(table.columns.values())
        for row in table.rows:
            if row.values is None or row.name in slips or not {"mean", "leaderboard"} & set(names):
                continue
            printed = dict(zip(names, row.values, strict=True))
            formula = "mean" if "mean" in names else "leaderboard"
            if printed[formula] is None:
                continue
            dev = {task: {metric: printed[f"{task}/{metric}"]} for task, metric in _PARTS}
            assert value_of(formula, dev, {}) == pytest.approx(printed[formula], abs=0.00101), row.name  # type: ignore[arg-type]
            checked += 1
    assert checked or report == "pal-lora"


_PARTS = [("sst", "accuracy"), ("para", "accuracy"), ("sts", "pearson")]


def test_a_plan_is_seed_by_seed_and_complete() -> None:
    paper = load_results("pal-lora")
    runs = plan("pal-lora", paper, ["sst_full", "sst_pal_lora"], Options(seeds=(3, 1), fraction=0.25, encoder="bert"))
    assert [(run.variant.name, run.seed) for run in runs] == [
        ("sst_full", 3),
        ("sst_pal_lora", 3),
        ("sst_full", 1),
        ("sst_pal_lora", 1),
    ]
    recipe = runs[0].recipe
    assert recipe.seed == 3 and recipe.data.fraction == 0.25 and recipe.encoder.path == "bert"
    assert recipe.data.dir is None and recipe.tasks["sst"].data.train == "sentiment-train.csv"
    assert not runs[0].missing


def test_members_of_a_family_that_are_the_recipe_itself_run_once() -> None:
    names = list(load_results("pal-lora").variants())
    assert {"sts_full", "sts_full@lr-1e-3", "pal_lora@rank-100"} <= set(names) and len(names) == len(set(names))
    assert not [name for name in names if name in ("sts_full@lr-1e-5", "pal_lora@rank-2")]


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    for name in ("ids-sst-train.csv", "ids-sst-dev.csv"):
        (tmp_path / name).write_text("")
    paper = load_results("pal-lora")
    options = Options(data=tmp_path)
    runs = plan("pal-lora", paper, ["sst_full", "cfimdb_full"], options)
    assert [run.missing for run in runs] == [(), ("ids-cfimdb-train.csv", "ids-cfimdb-dev.csv")]
    (line,) = [line for line in lines_of(paper.tables[0], runs, {}, {}) if line.run == "cfimdb_full"]
    assert line.note == f"not run: there is no ids-cfimdb-train.csv, ids-cfimdb-dev.csv in {tmp_path}"
    assert not any("demo corpus" in note for note in describe(options, paper, runs))


@pytest.mark.parametrize(
    ("report", "rows", "options", "message"),
    [
        ("pal-lore", [], Options(), "unknown report 'pal-lore'. Did you mean 'pal-lora'?"),
        ("pal-lora", ["sst_ful"], Options(), "unknown row 'sst_ful'. Did you mean 'sst_full'?"),
        ("pal-lora", [], Options(data=Path("/nowhere")), "--data: there is no folder /nowhere"),
        ("pal-lora", ["sst_full"], Options(overrides=("optimiser.lr=1",)), "Did you mean 'optimizer'?"),
    ],
)
def test_mistakes_are_told_before_anything_runs(report: str, rows: list[str], options: Options, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(report, load_results(report), rows, options)
    assert message in str(caught.value)


def test_demo_runs_say_that_they_cannot_be_compared() -> None:
    paper = load_results("pal-lora")
    options = Options(epochs=1, fraction=0.5)
    text = " ".join(describe(options, paper, plan("pal-lora", paper, ["sst_full"], options)))
    for part in ("demo corpus", "cannot be compared", "0.5 of the rows", "1 epoch.", "bert-base-uncased"):
        assert part in text


def test_epochs_are_a_limit() -> None:
    paper = load_results("pals-and-mnrl")
    epochs = {limit: plan("pals-and-mnrl", paper, ["baseline"], Options(epochs=limit))[0] for limit in (3, 30)}
    assert {limit: run.recipe.train.epochs for limit, run in epochs.items()} == {3: 3, 30: 10}


def test_phases_and_curricula_are_shortened() -> None:
    (run,) = plan("master-of-all-trades", load_results("master-of-all-trades"), ["base"], Options(epochs=4))
    assert [phase.recipe.train.epochs for phase in phases_of(run.recipe)] == [4, 4]
    (run,) = plan("pal-lora", load_results("pal-lora"), ["pal_lora"], Options(epochs=15))
    assert [phase.recipe.train.epochs for phase in phases_of(run.recipe)] == [10, 1, 15]
    name = "oversampling_curriculum"
    (run,) = plan("pals-and-mnrl", load_results("pals-and-mnrl"), [name], Options(epochs=2))
    assert (run.recipe.train.epochs, run.recipe.sampler.curriculum) == (2, 1.0)


@pytest.fixture
def paper() -> PaperResults:
    columns = {"SST": "sst/accuracy", "STS": "sts/pearson", "Mean": "mean"}
    rows = [
        {"name": "whole", "recipe": "sst_full", "values": [0.4, 0.25, None]},
        {"name": "family", "recipe": "sst_full", "sweep": {"lr 1": {"optimizer.lr": 1.0}, "lr 2": {"optimizer.lr": 2}}},
        {"name": "odd", "reason": "nobody knows how", "values": [0.1, None, None]},
    ]
    tables = [{"name": "Table 1", "title": "dev", "columns": columns, "rows": rows}]
    return PaperResults.model_validate({"title": "A report", "encoder": "bert", "tables": tables})


def test_tables_have_means_and_spreads_over_seeds(paper: PaperResults) -> None:
    runs = plan("pal-lora", paper, [], Options(seeds=(1, 2)))
    assert [run.recipe.optimizer.lr for run in runs] == [1e-5, 1.0, 2.0] * 2
    outcomes = {run.folder: outcome(run.seed, 0.2 * run.seed) for run in runs if run.variant.name == "sst_full"}
    failures = {run.folder: "failed with status 1" for run in runs if run.variant.name == "sst_full@lr-1"}
    lines = list(lines_of(paper.tables[0], runs, outcomes, failures))
    assert [line.name for line in lines] == ["whole", "family: lr 1", "family: lr 2", "odd"]
    assert lines[0].cells[1].mean == pytest.approx(0.3)
    assert lines[0].cells[1].deviation == pytest.approx(0.2 / 2**0.5)
    assert lines[0].cells[2].mean is None  # without paraphrases there is no mean of three
    assert [line.note for line in lines] == [
        "",
        "failed with status 1",
        "not finished",
        "not run: nobody knows how",
    ]
    page = markdown("A report", ["A note."], [(paper.tables[0], lines)])
    assert "| whole | 0.400 | 0.500 ± 0.000 | 0.250 | 0.300 ± 0.141 |  |  | 60 |" in page
    assert "| sst_full | 2 | 9 | 60 | aaaaaaaaaa |" in page and "A note." in page
    found = as_json("pal-lora", paper, ["A note."], [(paper.tables[0], lines)])
    row = json.loads(json.dumps(found))["tables"][0]["rows"][0]
    assert row["paper"] == {"SST": 0.4, "STS": 0.25, "Mean": None}
    assert [run["seed"] for run in row["runs"]] == [1, 2] and row["runs"][0]["commit"] == "a" * 40


@pytest.mark.parametrize(
    "row", [{"name": "x", "recipe": "a", "values": [1.0]}, {"name": "x"}, {"name": "x", "recipe": "a", "reason": "b"}]
)
def test_malformed_rows_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="x"):
        Table.model_validate({"name": "t", "title": "", "columns": {"A": "mean", "B": "mean"}, "rows": [row]})


@pytest.mark.slow(30)
def test_stopped_runs_go_on_and_finished_ones_stay(tiny_bert: Path, tmp_path: Path) -> None:
    output, environment = tmp_path / "out", cpu_environment()
    settings = (f"data.cache_dir={tmp_path / 'cache'}", "sampler.batch_size=2", "train.max_steps=12")
    command = ["fastmtl", "reproduce", "minbert-extensions", *settings, "--rows", "ce_bce_cos", "--seeds", "2"]
    command += ["--fraction", "0.05", "--encoder", str(tiny_bert), "--output", str(output)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    directory = output / "ce_bce_cos" / "seed-2"
    metrics = directory / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.is_file() or not metrics.read_text():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=100)
    assert run.returncode == 130 and "run the same command to continue" in text, text
    assert not (directory / "outcome.json").exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 13))
    first = (output / "results.json").read_text()
    (row,) = [row for table in json.loads(first)["tables"] for row in table["rows"] if row["runs"]]
    assert [run["seed"] for run in row["runs"]] == [2] and 0 < row["mean"]["SST train"] <= 1
    assert not (directory / "checkpoints").exists() and (directory / "model").is_dir()
    assert "cannot be compared" in done.stdout and "CE+BCE+COS" in (output / "results.md").read_text()

    finished = (directory / "outcome.json").stat().st_mtime_ns
    options = Options(fraction=0.05, encoder=str(tiny_bert), seeds=(2,), overrides=settings)
    assert run_report("minbert-extensions", ["ce_bce_cos"], options, output) == 0
    assert (output / "results.json").read_text() == first
    assert (directory / "outcome.json").stat().st_mtime_ns == finished
    with pytest.raises(UserError, match="there is no command no-such-launcher"):
        run_report("minbert-extensions", ["ce_bce_cos"], options, output, ["no-such-launcher"])
    other = dataclasses.replace(options, fraction=0.1)
    with pytest.raises(UserError, match=r"is a run with data\.fraction: 0\.05, now 0\.1"):
        run_report("minbert-extensions", ["ce_bce_cos"], other, output)
