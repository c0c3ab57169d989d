"""Resumed runs with other settings, other rows and another length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from left_by_run import lasting, lines, same, weights
from safetensors.torch import load_file
from scripts import run_script

pytestmark = pytest.mark.slow(12)

CASES = Path(__file__).with_name("resume_cases.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    directory = tmp_path_factory.mktemp("resumed")
    (directory / "log.txt").write_text(run_script(CASES, directory, tiny_bert))
    return directory


def test_a_longer_run_is_the_uninterrupted_one(runs: Path) -> None:
    in_parts, whole = runs / "in parts[1]", runs / "whole"

    def lasting_but_rare(run: Path) -> list[dict[str, Any]]:
        return [line for line in lasting(run) if line["step"] not in (5, 7)]  # one part logged every second step

    found = lasting_but_rare(in_parts)
    assert found == lasting_but_rare(whole)
    assert [line["step"] for line in found if "dev" in line] == [6, 12]
    for part in ("model", "adapters", "heads"):
        assert same(weights(in_parts, part), weights(whole, part))
    for task in ("kind", "same", "degree"):
        one, two = (run / "predictions" / f"{task}-dev.csv" for run in (in_parts, whole))
        assert one.read_bytes() == two.read_bytes()
    assert same(*(load_file(run / "checkpoints" / "step-12" / "random-0.safetensors") for run in (in_parts, whole)))
    assert not (in_parts / ".set-aside").exists()


def test_weights_from_sums_of_squared_gradients_and_averaged_weights_go_on(runs: Path) -> None:
    parts, whole = runs / "balanced-parts", runs / "balanced"
    assert lasting(parts) == lasting(whole)
    for part in ("model", "adapters", "heads"):
        assert same(weights(parts, part), weights(whole, part))
    last = [run / "checkpoints" / "step-4" for run in (parts, whole)]
    assert same(*(load_file(path / "tensors.safetensors") for path in last))
    averages = load_file(last[0] / "tensors.safetensors")
    tasks = ["kind", "same", "degree"]
    for name, weight in weights(parts, "heads").items():  # model/ has the average
        task, _, rest = name.partition(".")
        assert torch.equal(weight, averages[f"ema.heads.{tasks.index(task)}.{rest}"])
    states = [json.loads((path / "state.json").read_text())["surgery"]["balance"] for path in last]
    assert states[0] == states[1] and states[0]["steps"] == [4, 4, 4] and len(set(states[0]["logits"])) == 3


def test_a_check_finds_the_checkpoint_and_changes_nothing(runs: Path) -> None:
    message = json.loads((runs / "messages.json").read_text())["check"]
    assert message.startswith("checked, nothing was trained: 3 tasks, 6 files, ")
    assert message.endswith("1 process, resumed after step 4")


def test_other_settings_are_refused_all_at_once(runs: Path) -> None:
    message = json.loads((runs / "messages.json").read_text())["settings"]
    for change in ("optimizer.lr: 0.003, now 0.5", "seed: 1, now 5", "sampler.batch_size: 8, now 4"):
        assert change in message
    assert "train.epochs" not in message and "--accept-changes" in message


def test_other_rows_are_refused_and_the_same_rows_elsewhere_are_not(runs: Path) -> None:
    message = json.loads((runs / "messages.json").read_text())["rows"]
    assert "rows of kind train" in message and "rows of same" not in message and "optimizer" not in message
    records = [json.loads(text) for text in (runs / "in parts[1]" / "changes.jsonl").read_text().splitlines()]
    assert [record["changes"].keys() for record in records] == [
        {"train.epochs", "train.max_steps", "train.log_every"},
        {"train.max_steps", "train.log_every", "data.dir", "data.cache_dir"},
    ]


def test_accepted_changes_count_and_are_recorded(runs: Path) -> None:
    rates = [line["lr"]["encoder"] for line in lines(runs / "changed") if "loss" in line]
    assert rates == [0.003] * 4 + [pytest.approx(0.5 * (1 - step / 12)) for step in range(5, 13)]  # of the next step
    assert "linear follows the new number of steps" in (runs / "log.txt").read_text()
    (record,) = [json.loads(text) for text in (runs / "changed" / "changes.jsonl").read_text().splitlines()]
    assert record["step"] == 4 and record["changes"]["optimizer.lr"] == [0.003, 0.5]
    page = (runs / "changed" / "report.html").read_text()
    assert "rows of kind train (digest)" in record["changes"] and "rows of kind train (digest)" in page
