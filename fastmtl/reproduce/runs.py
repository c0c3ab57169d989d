"""Runs a plan, each run a process of `fastmtl train`, and reads back what they reached.

A finished run is not made again, a stopped one goes on from its newest checkpoint. Output directory:
`RECIPE/seed-N/` (a run's own files without its checkpoints, recipe.yaml, outcome.json), results.json, results.md.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastmtl.checkout import checkout
from fastmtl.config import Recipe, load_recipe
from fastmtl.errors import UserError
from fastmtl.reproduce.plan import PlannedRun

OUTCOME = "outcome.json"
_FASTMTL = (sys.executable, "-c", "from fastmtl.cli import main; main()")


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached: {task: {metric: value}} of the kept model on the dev rows and, where a table asks
    for it, on the training rows; seconds of training; the checkout's commit and whether it was clean.
    """

    seed: int
    dev: dict[str, dict[str, float]]
    train: dict[str, dict[str, float]]
    seconds: float
    steps: int
    commit: str | None
    clean: bool | None
    finished: str


class Interrupted(Exception):
    """A run was stopped; those before it are finished."""


def check_directory(output: Path, runs: list[PlannedRun]) -> None:
    """Raises UserError where the directory holds a run of other settings, and names the first key that differs."""
    for run in runs:
        file = output / run.folder / "recipe.yaml"
        if not file.is_file():
            continue
        difference = _difference(load_recipe(str(file)), run.recipe)
        if difference is not None:
            raise UserError(
                f"{file.parent} is a run with {difference}: choose another place by --output, or the settings of before"
            )


def run_all(
    output: Path, runs: list[PlannedRun], *, train_scores: bool, say: Callable[[str], None]
) -> tuple[dict[Path, Outcome], dict[Path, str]]:
    """Makes the runs that are not finished. Returns outcomes, and reasons of those that failed, by `PlannedRun.folder`.

    Raises Interrupted after SIGINT or SIGTERM; the run at hand has then saved where it is.
    """
    outcomes: dict[Path, Outcome] = {}
    failures: dict[Path, str] = {}
    for number, run in enumerate(runs, start=1):
        if run.missing:
            continue
        directory = output / run.folder
        if (directory / OUTCOME).is_file():
            outcomes[run.folder] = _read_outcome(directory)
            continue
        say(f"run {number} of {len(runs)}: {run.variant.name}, seed {run.seed}")
        status = _train(directory, run.recipe)
        if status == 0 and (directory / "results.json").is_file():
            outcomes[run.folder] = _finish(directory, run, train_scores)
        else:
            failures[run.folder] = f"failed with status {status}" if status else "stopped before its end"
            say(f"{run.variant.name}, seed {run.seed}: {failures[run.folder]}; going on with the next run")
    return outcomes, failures


def read_outcomes(output: Path, runs: list[PlannedRun]) -> dict[Path, Outcome]:
    """Of the runs that are finished, by `PlannedRun.folder`."""
    finished = (run.folder for run in runs if (output / run.folder / OUTCOME).is_file())
    return {folder: _read_outcome(output / folder) for folder in finished}


def _train(directory: Path, recipe: Recipe) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "recipe.yaml"
    file.write_text(recipe.dump(), encoding="utf-8")
    return _fastmtl("train", str(file), "--output", str(directory), "--resume")


def _finish(directory: Path, run: PlannedRun, train_scores: bool) -> Outcome:
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    outcome = Outcome(
        seed=run.seed,
        dev=results["dev"],
        train=_train_scores(directory) if train_scores else {},
        seconds=results["seconds"],
        steps=results["steps"],
        finished=results["finished"],
        **checkout(),
    )
    (directory / OUTCOME).write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # the largest part of a run; nothing goes on from here
    return outcome


def _read_outcome(directory: Path) -> Outcome:
    return Outcome(**json.loads((directory / OUTCOME).read_text(encoding="utf-8")))


def _train_scores(directory: Path) -> dict[str, dict[str, float]]:
    command = [*_FASTMTL, "evaluate", str(directory), "--split", "train", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{directory}: the training rows could not be scored, see above")
    return json.loads(done.stdout)["tasks"]


def _fastmtl(*arguments: str) -> int:
    """The exit status of a command in a process of its own. A stop is passed on and waited for."""
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        if process is not None:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        process = subprocess.Popen([*_FASTMTL, *arguments])
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # the terminal has sent it to the process, too
                stopped.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise Interrupted
    return status


def _difference(before: Recipe, now: Recipe) -> str | None:
    """`data.fraction: 0.5, now 1.0` of the first key that differs."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key) and key != "description":
            return f"{key}: {old.get(key)}, now {new.get(key)}"
    return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return {key: value for part in parts for key, value in part.items()}
