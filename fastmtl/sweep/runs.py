"""Runs the points of a sweep, each a process of `fastmtl train`, and reads back what they reached.

Directory: `points/POINT/` (the run's own files without checkpoints, recipe.yaml, log.txt),
sweep.csv, .md and .svg.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.config import load_recipe
from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json
from fastmtl.sweep.child_process import FASTMTL, Interrupted, difference, run_fastmtl
from fastmtl.sweep.grid import Point

OK, FAILED, INTERRUPTED = 0, 1, 130


@dataclass(frozen=True)
class Result:
    """results: of a finished run (`results.json`), None with the reason in `error` for one that
    failed, and without one for a point whose turn has not come.
    """

    point: Point
    results: dict[str, Any] | None
    error: str = ""


def run_points(
    directory: Path, points: Sequence[Point], say: Callable[[str], None], launcher: Sequence[str] = ()
) -> tuple[list[Result], int]:
    """Makes the runs that are not finished; those that failed before are tried again. Returns all
    and a status: 1 where one failed, 130 after a stop.

    launcher: a command that is put in front of `fastmtl train` (deepspeed --no_python); default:
    one process. Raises UserError where the directory holds a point's run with other settings.
    """
    _check(directory, points)
    results: list[Result] = []
    status = OK
    for number, point in enumerate(points, start=1):
        place = directory / "points" / point.folder
        found = _finished(place)
        if found is None and status != INTERRUPTED:
            say(f"point {number} of {len(points)}: {point.name}")
            try:
                error = _run(place, point, launcher)
            except Interrupted:
                status = INTERRUPTED
                error = ""
            found = None if error else _finished(place)
            if error:
                say(f"{point.name}: {error}")
                status = FAILED
            results.append(Result(point, found, error))
        else:
            results.append(Result(point, found))
    return results, status


def _check(directory: Path, points: Sequence[Point]) -> None:
    for point in points:
        file = directory / "points" / point.folder / "recipe.yaml"
        if file.is_file():
            changed = difference(load_recipe(str(file)), point.recipe)
            if changed is not None:
                raise UserError(
                    f"{file.parent} is a run with {changed}: choose another place by --output, or the former settings"
                )


def _run(place: Path, point: Point, launcher: Sequence[str]) -> str:
    """Why the run failed, "" where it did not."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "recipe.yaml"
    file.write_text(point.recipe.dump(), encoding="utf-8")
    command = [*launcher, "fastmtl"] if launcher else FASTMTL
    log = place / "log.txt"
    status = run_fastmtl("train", str(file), "--output", str(place), "--resume", command=command, log=log)
    if status == 0 and _finished(place) is not None:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)  # the largest part of a run; nothing goes on from here
        return ""
    told = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    mistakes = [line for line in told if line.startswith("fastmtl")]
    reason = (mistakes or told or ["no output"])[-1].removeprefix("fastmtl: ")
    return f"failed with status {status}: {reason}" if status else f"stopped before its end: {reason}"


def _finished(place: Path) -> dict[str, Any] | None:
    file = place / "results.json"
    return read_json(file) if file.is_file() else None
