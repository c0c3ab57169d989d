"""The runs of a sweep: a process of `fastmtl train` for each point, and the reading of results.

The sweep's directory contains `points/POINT/` (the run's files without checkpoints, recipe.yaml,
log.txt), sweep.csv, sweep.md and sweep.svg.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.config import load_recipe
from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json
from fastmtl.files.output_folder import check_output
from fastmtl.sweep.child_process import FASTMTL, Interrupted, difference, run_fastmtl
from fastmtl.sweep.grid import Point

OK, FAILED, INTERRUPTED = 0, 1, 130


@dataclass(frozen=True)
class Result:
    """The result of a point.

    results: the contents of results.json if the run is finished, else None. error: the reason of a
    failed run; "" for a finished run and for one that has not started.
    """

    point: Point
    results: dict[str, Any] | None
    error: str = ""


def run_points(
    directory: Path, points: Sequence[Point], say: Callable[[str], None], launcher: Sequence[str] = ()
) -> tuple[list[Result], int]:
    """Run the points that are not finished; earlier failures are tried again.

    Returns all results and a status: 0, 1 if a point failed, 130 after a stop. say: prints a line
    for the user. launcher: a command in front of `fastmtl train` (deepspeed --no_python); default:
    one process. Raises UserError if the directory has a point's run with other settings.
    """
    check_unchanged(directory, points)
    results: list[Result] = []
    status = OK
    for number, point in enumerate(points, start=1):
        place = directory / "points" / point.folder
        found = finished(place)
        if found is None and status != INTERRUPTED:
            say(f"point {number} of {len(points)}: {point.name}")
            try:
                error = _run(place, point, launcher)
            except Interrupted:
                status = INTERRUPTED
                error = ""
            found = None if error else finished(place)
            if error:
                say(f"{point.name}: {error}")
                status = FAILED
            results.append(Result(point, found, error))
        else:
            results.append(Result(point, found))
    return results, status


def check_unchanged(directory: Path, points: Sequence[Point]) -> None:
    """Raise UserError if the directory has a run of one of the points with other settings."""
    for point in points:
        file = directory / "points" / point.folder / "recipe.yaml"
        if file.is_file():
            changed = difference(load_recipe(str(file)), point.recipe)
            if changed is not None:
                raise UserError(
                    f"{file.parent} is a run with {changed}: choose another place with --output, or the former settings"
                )


def _run(place: Path, point: Point, launcher: Sequence[str]) -> str:
    """Run a point and return the reason of its failure, "" if it succeeded."""
    wait_until_free(place)
    arguments = training_arguments(place, point)
    return ended(place, run_fastmtl(*arguments, command=starting(launcher), log=place / "log.txt"))


def starting(launcher: Sequence[str]) -> Sequence[str]:
    """Return the words that start `fastmtl` in a child process."""
    return [*launcher, "fastmtl"] if launcher else FASTMTL


def wait_until_free(place: Path, seconds: float = 60.0) -> None:
    """Create a run's folder, or wait until another process has left it.

    The run of a sweep that was killed saves a checkpoint before it ends. After `seconds` the run
    itself reports who has the folder.
    """
    place.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            check_output(place, resume=True)
            return
        except UserError:
            time.sleep(0.2)


def training_arguments(place: Path, point: Point) -> list[str]:
    """Write the recipe of a point to its folder; return the arguments that train it there."""
    file = place / "recipe.yaml"
    file.write_text(point.recipe.dump(), encoding="utf-8")
    return ["train", str(file), "--output", str(place), "--resume"]


def ended(place: Path, status: int) -> str:
    """Tidy a run's folder after its end; return the reason of a failure, "" for a success.

    status: the exit status of the command, whose output is in log.txt.
    """
    log = place / "log.txt"
    if status == 0 and finished(place) is not None:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)  # the largest part of a run; not needed any more
        return ""
    printed = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    mistakes = [line for line in printed if line.startswith("fastmtl")]
    reason = (mistakes or printed or ["no output"])[-1].removeprefix("fastmtl: ")
    return f"failed with status {status}: {reason}" if status else f"stopped before its end: {reason}"


def finished(place: Path) -> dict[str, Any] | None:
    """Return the contents of results.json of a finished run, None for any other."""
    file = place / "results.json"
    return read_json(file) if file.is_file() else None
