"""The whole chain with the real launchers: train, stop, resume, and the files of a run."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from eight_tasks import COLORS, ENDINGS, eight_tasks, write_eight_tasks
from huggingface_hub import ModelCard
from launch import cpu_environment, nothing_in_shared_memory, two_processes
from left_by_run import lasting as _lasting
from left_by_run import lines as _lines
from left_by_run import same, weights

from fastmtl import cli
from fastmtl.engine.distributed import free_port

pytestmark = pytest.mark.slow(75)

DEV_ROWS = 31  # the last evaluation batch is not full on one of two ranks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """Return a recipe with a task of every type."""
    directory = tmp_path_factory.mktemp("data")
    write_eight_tasks(directory, {"train": 100, "dev": DEV_ROWS})
    values = {
        "encoder": {"path": str(tiny_bert)},
        "adapter": {"name": "pal", "size": 8, "heads": 2},
        "data": {"dir": str(directory), "cache_dir": str(directory / "cache")},
        "tasks": eight_tasks(),
        "sampler": {"batch_size": 2},
        "gradient": {"method": "pcgrad"},
        "optimizer": {"lr": 3e-3, "head_lr": 1e-2},
        "engine": {"zero": 2},
        "train": {"epochs": 2, "max_steps": 50},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _launch(recipe: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = two_processes()
    command += ["--no_python", "fastmtl", "train", str(recipe), "--output", str(output), *more]
    return subprocess.Popen(command, env=cpu_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _torchrun(port: str) -> list[str]:
    return ["torchrun", "--nproc-per-node", "2", "--master-port", port, "--no-python", "fastmtl", "train"]


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of torchrun; test_demo_recipe.py has one of the deepspeed command."""
    output, port = tmp_path_factory.mktemp("whole") / "run", free_port()
    done = subprocess.run(
        [*_torchrun(port), str(recipe), "--output", str(output)],
        env=cpu_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "dev scores" in done.stdout
    assert nothing_in_shared_memory(port)
    return output


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "report.html", "model/model.safetensors", "model/heads.safetensors"):
        assert (whole / name).is_file(), name
    for task in ("kind", "same", "degree", "answer", "colors"):  # a line for each row
        rows = (whole / "predictions" / f"{task}-dev.csv").read_text(encoding="utf-8").splitlines()
        assert len(rows) == 1 + DEV_ROWS
    assert any(path.name.startswith("events") for path in (whole / "tensorboard").iterdir())
    steps = [line for line in _lines(whole) if "loss" in line]
    assert all(line["surgery_seconds"] > 0 and line["surgery_bytes"] > 0 for line in steps)
    losses = [line["loss"]["kind"] for line in steps]
    assert sum(losses[-8:]) < sum(losses[:8])
    scores = ModelCard.load(whole / "model" / "README.md").data.eval_results
    dev = json.loads((whole / "results.json").read_text(encoding="utf-8"))["dev"]
    assert {(one.task_name, one.metric_type): one.metric_value for one in scores} == {
        (task, metric): round(value, 4) for task, metrics in dev.items() for metric, value in metrics.items()
    }


def test_config_of_a_run_repeats_it(whole: Path, recipe: Path) -> None:
    from fastmtl.config import load_recipe

    assert load_recipe(str(whole / "config.yaml")) == load_recipe(str(recipe))


def test_the_model_has_numbers_for_words_of_the_recipe(whole: Path, recipe: Path) -> None:
    """The weights are from training rows, the thresholds from dev rows; config.yaml has words."""
    config = yaml.safe_load((whole / "config.yaml").read_text(encoding="utf-8"))["tasks"]
    tasks = json.loads((whole / "model" / "fastmtl.json").read_text(encoding="utf-8"))["recipe"]["tasks"]
    assert config["colors"]["class_weights"] == "balanced"
    with (recipe.parent / "colors-train.csv").open(encoding="utf-8") as file:
        sets = [row["label"].split(";") for row in csv.DictReader(file)]
    counts = [sum(color in found for found in sets) for color in COLORS]
    assert tasks["colors"]["class_weights"] == pytest.approx([len(sets) / count - 1 for count in counts])
    assert config["colors"]["multilabel"]["thresholds"] == "tuned"
    thresholds = tasks["colors"]["multilabel"]["thresholds"]
    table = json.loads((whole / "results.json").read_text(encoding="utf-8"))["per_label"]["colors"]
    assert [f"{value:.3f}" for value in thresholds] == [row[table["head"].index("threshold")] for row in table["rows"]]


def test_evaluate_finds_the_scores_of_the_run(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastmtl", "evaluate", str(whole / "model"), "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((whole / "results.json").read_text(encoding="utf-8"))["dev"]
    tasks = found.get("dev", found.get("tasks", found))
    for task, metrics in kept.items():
        for name, value in metrics.items():
            assert tasks[task][name] == pytest.approx(value, abs=1e-5)


def test_predict_repeats_the_predictions_of_the_run(
    whole: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for task, ending in ENDINGS.items():
        output = tmp_path / f"{task}.csv"
        command = ["predict", str(whole / "model"), "--task", task, "--input", f"{recipe.parent}/{task}-dev.{ending}"]
        command += ["--format", "cs224n"] if ending == "tsv" else []
        monkeypatch.setattr(sys, "argv", ["fastmtl", *command, "--output", str(output)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        found, kept = _cells(output), _cells(whole / "predictions" / f"{task}-dev.csv")
        assert len(found) == len(kept) > DEV_ROWS
        for one, two in zip(found, kept, strict=True):
            assert one == [pytest.approx(cell, abs=2e-5) if isinstance(cell, float) else cell for cell in two]


def _cells(file: Path) -> list[list[str | float]]:
    """Return the cells of a file of predictions; cells with a decimal point are numbers."""
    with file.open(encoding="utf-8", newline="") as stream:
        return [[float(cell) if "." in cell else cell for cell in row] for row in csv.reader(stream)]


def test_report_has_the_tables_of_each_type(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    metrics_by = {
        "kind": "class",
        "same": "class",
        "tags": "entity type",
        "answer": "questions",
        "colors": "label",
        "next": "number of choices",
        "find": "number of candidates",
    }
    captions = [f"{task}: metrics by {column}" for task, column in metrics_by.items()]
    captions += [f"{task}: confusion matrix" for task in ("kind", "same", "tags")]
    captions += [f"{task}: largest errors" for task in ("kind", "same", "degree", "answer", "colors", "next")]
    missing = [caption for caption in captions if caption not in page]
    assert not missing


def test_killed_stopped_and_resumed_run_is_bitwise_the_same(whole: Path, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = _launch(recipe, output, "train.checkpoint_every=2")
    _wait_for_steps(run, output, 5)
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if "train" in p.cmdline() and _is_rank(p)]
    assert len(ranks) == 2
    for rank in ranks:
        rank.kill()
    run.communicate(timeout=100)
    assert run.returncode
    killed = _steps(output)
    assert 4 <= killed < _steps(whole)
    assert _lines(output)[0]["loss"] == _lines(whole)[0]["loss"]  # of the other launcher

    run = _launch(recipe, output, "--resume")
    _wait_for_steps(run, output, killed + 3)
    run.terminate()  # the deepspeed command does not forward it
    text, _ = run.communicate(timeout=100)  # returns after the last process that writes there
    assert run.returncode == -signal.SIGTERM and "continue with --resume" in text
    assert killed < _steps(output) < _steps(whole)

    # Another launcher, and batches without prefetching: the run is equal.
    command = [*_torchrun(free_port()), str(recipe), "--output", str(output), "--resume", "data.prefetch=0"]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _lasting(output) == _lasting(whole)
    for part in ("model", "adapters", "heads"):
        assert same(weights(output, part), weights(whole, part))
    for task in ENDINGS:
        one, two = (run / "predictions" / f"{task}-dev.csv" for run in (output, whole))
        assert one.read_bytes() == two.read_bytes()


def _steps(output: Path) -> int:
    return len([line for line in _lines(output) if "loss" in line])


def _wait_for_steps(run: subprocess.Popen[str], output: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or _steps(output) < steps:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def _is_rank(process: psutil.Process) -> bool:
    return "RANK" in process.environ()


def test_one_process_trains_without_a_launcher(recipe: Path, tmp_path: Path) -> None:
    command = ["fastmtl", "train", str(recipe), "train.max_steps=3", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 2, 3, 3]
