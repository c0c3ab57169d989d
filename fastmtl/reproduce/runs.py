"""The runs of a plan: a process of `fastmtl train` for each, and the reading of their results.

A finished run is not repeated; a stopped one resumes from its newest checkpoint. Output directory:
`RECIPE/seed-N/` (a run's files without its checkpoints, recipe.yaml, outcome.json), results.json,
results.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastmtl.config import Recipe, load_recipe
from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json
from fastmtl.measure.checkout import checkout
from fastmtl.reproduce.plan import PlannedRun
from fastmtl.sweep.child_process import FASTMTL, difference, run_fastmtl

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run.

    dev, train: {task: {metric: value}} of the kept model on the dev rows and, if a table needs it,
    on the training rows. seconds: training time. commit, clean: the checkout's commit and whether
    it had no changes.
    """

    seed: int
    dev: dict[str, dict[str, float]]
    train: dict[str, dict[str, float]]
    seconds: float
    steps: int
    commit: str | None
    clean: bool | None
    finished: str


def check_directory(output: Path, runs: list[PlannedRun]) -> None:
    """Raise UserError if the directory has one of the runs with other settings.

    The message names the first setting that differs.
    """
    for run in runs:
        file = output / run.folder / "recipe.yaml"
        if not file.is_file():
            continue
        changed = difference(load_recipe(str(file)), run.recipe)
        if changed is not None:
            raise UserError(
                f"{file.parent} is a run with {changed}: choose another place with --output, or the former settings"
            )


def run_all(
    output: Path,
    runs: list[PlannedRun],
    *,
    train_scores: bool,
    say: Callable[[str], None],
    launcher: Sequence[str] = (),
) -> tuple[dict[Path, Outcome], dict[Path, str]]:
    """Run the runs that are not finished; return (outcomes, reasons of failures).

    Both are keyed by `PlannedRun.folder`. train_scores: also score the training rows. say: prints a
    line for the user. launcher: a command in front of `fastmtl train` (deepspeed --no_python);
    default: one process. Raises Interrupted after SIGINT or SIGTERM; the current run has then saved
    a checkpoint.
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
        status = _train(directory, run.recipe, launcher)
        if status == 0 and (directory / "results.json").is_file():
            outcomes[run.folder] = _finish(directory, run, train_scores)
        else:
            failures[run.folder] = f"failed with status {status}" if status else "stopped before its end"
            say(f"{run.variant.name}, seed {run.seed}: {failures[run.folder]}; continuing with the next run")
    return outcomes, failures


def read_outcomes(output: Path, runs: list[PlannedRun]) -> dict[Path, Outcome]:
    """Return the outcomes of the finished runs by `PlannedRun.folder`."""
    finished = (run.folder for run in runs if (output / run.folder / OUTCOME).is_file())
    return {folder: _read_outcome(output / folder) for folder in finished}


def _train(directory: Path, recipe: Recipe, launcher: Sequence[str]) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "recipe.yaml"
    file.write_text(recipe.dump(), encoding="utf-8")
    command = [*launcher, "fastmtl"] if launcher else FASTMTL
    return run_fastmtl("train", str(file), "--output", str(directory), "--resume", command=command)


def _finish(directory: Path, run: PlannedRun, train_scores: bool) -> Outcome:
    results = read_json(directory / "results.json")
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
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # the largest part of a run; not needed any more
    return outcome


def _read_outcome(directory: Path) -> Outcome:
    file = directory / OUTCOME
    try:
        return Outcome(**read_json(file))
    except TypeError:
        raise UserError(f"{file}: not what a finished run leaves; remove {directory} to run it again") from None


def _train_scores(directory: Path) -> dict[str, dict[str, float]]:
    command = [*FASTMTL, "evaluate", str(directory), "--split", "train", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{directory}: the training rows could not be scored, see above")
    return json.loads(done.stdout)["tasks"]
