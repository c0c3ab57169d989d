"""`fastmtl profile`: measure and predict every point, and save each at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.measure import result_file
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import Say
from fastmtl.profile import advice, process
from fastmtl.profile.find_max import find_max
from fastmtl.profile.measure import Job, dumped, measure
from fastmtl.profile.plan import Plan, Point, device_of_this_machine
from fastmtl.profile.predict import Prediction, predict
from fastmtl.training.phases import Phase

FILE = "profile.json"
STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 4, 8, 16)


def profile(
    recipe: Recipe,
    phase: Phase,
    name: str,
    points: Sequence[Point],
    output: Path,
    say: Say,
    *,
    memory_limit: int | None = None,
    search: bool = False,
    trace: bool = False,
    commit: str | None = None,
) -> dict[str, Any]:
    """Return the profile, JSON-ready, and save it after every point in output/profile.json.

    phase: the phase of the recipe to profile. memory_limit: bytes; None: the device's memory.
    search: True to search the largest batch size that fits, for every series. trace: True to trace
    the last point of every series. If a point fails, the profile has the reason, and the other
    points still run. Raises UserError for a recipe that cannot be trained.
    """
    device = device_of_this_machine()
    say("reading the recipe's data")
    plan = Plan(phase, on_gpu=device.type == "cuda")
    limit = memory_limit or memory_of(device)
    result: dict[str, Any] = {
        "benchmark": "profile",
        "environment": environment(device, commit),
        "recipe": name,
        "phase": phase.name,
        "settings": dumped(phase.recipe),
        "parameters": plan.parameters(),
        "memory_limit": limit,
        "limit_given": memory_limit is not None,
        "points": [],
    }
    last = {point.series: point for point in points}
    for number, point in enumerate(points, start=1):
        say(f"point {number} of {len(points)}: {point}")
        file = output / f"trace-{point.series.replace(' ', '-')}.json.gz"
        wants_trace = trace and last[point.series] == point
        job = Job(dumped(recipe), phase.name, point, memory_limit, trace=str(file) if wants_trace else None)
        result["points"].append(_entry(plan, point, process.run(measure, job)))
        save(result, output / FILE)
    result["spread"] = [_spread(plan, point) for point in last.values()]
    if search:
        result["largest"] = []
        for point in last.values():
            result["largest"].append(
                find_max(dumped(recipe), plan, point, limit, say, advice.overhead_bytes(result["points"]))
            )
            save(result, output / FILE)
    say("advice")
    result["advice"] = advice.advice(plan, result)
    save(result, output / FILE)
    return result


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's whole memory, or of the host's available memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def save(result: dict[str, Any], file: Path) -> None:
    """Write the result, replacing the file atomically. Raise UserError if it cannot be written."""
    try:
        result_file.save(result, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


def _entry(plan: Plan, point: Point, outcome: process.Outcome) -> dict[str, Any]:
    predicted = plan.predict(point)
    measured = outcome.result
    entry: dict[str, Any] = {
        "batch_size": point.batch_size,
        "method": point.method,
        "storage": point.storage,
        "series": point.series,
        "predicted": _prediction_entry(predicted),
        "measured": measured,
        "failed": outcome.failed or None,
        "out_of_memory": outcome.out_of_memory,
    }
    if measured is not None:
        entry["error"] = predicted.nbytes / measured["bytes"] - 1
    return entry


def _prediction_entry(predicted: Prediction) -> dict[str, Any]:
    return {"parts": predicted.parts, "bytes": predicted.nbytes, "phase": predicted.phase, "kept": predicted.kept}


def _spread(plan: Plan, point: Point) -> dict[str, Any]:
    """Return one rank's predicted peak by ZeRO stage and number of ranks, for the same rows."""
    here = plan.shape(point)
    stages = {}
    for stage in STAGES:
        shapes = {world: here.spread(stage, world) for world in WORLDS}
        stages[str(stage)] = {
            "storage": shapes[1].storage,
            "bytes": {str(world): predict(shape).nbytes for world, shape in shapes.items()},
        }
    return {"series": point.series, "batch_size": point.batch_size, "stages": stages}
