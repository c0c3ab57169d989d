"""`fastmtl profile --scale-out`: measured parts of a step or lower bounds, predictions, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import Say
from fastmtl.profile import process
from fastmtl.profile.floors import floors
from fastmtl.profile.links import Cluster
from fastmtl.profile.measure import Job, dumped, measure
from fastmtl.profile.plan import Plan, Point, device_of_this_machine
from fastmtl.profile.run import save
from fastmtl.profile.scale_out import Parts, scale_out
from fastmtl.training.phases import Phase

# Numbers of ranks in the table by number of tasks.
SHOWN = (8, 64, 1024)


def predict_scale(
    recipe: Recipe,
    phase: Phase,
    name: str,
    points: Sequence[Point],
    output: Path,
    say: Say,
    cluster: Cluster,
    *,
    device_of_floors: str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Predict the times of steps on many ranks, and save them in output/scale-out.json.

    Returns the saved result. The last point of every series is used. device_of_floors: a device
    whose lower bounds replace measurements. Raises UserError if it is unknown, and if a point
    cannot be measured.
    """
    device = device_of_this_machine()
    say("reading the recipe's data")
    plan = Plan(phase, on_gpu=device_of_floors is not None or device.type == "cuda")
    result: dict[str, Any] = {
        "benchmark": "scale-out",
        "environment": environment(device, commit),
        "recipe": name,
        "phase": phase.name,
        "settings": dumped(phase.recipe),
        "series": [],
    }
    for point in {point.series: point for point in points}.values():
        shape = plan.shape(point)
        say(f"{point}")
        if device_of_floors is not None:
            parts = floors(shape, device_of_floors)
        else:
            source = f"measured, one rank on {result['environment']['device']}"
            parts = Parts(_measured(recipe, phase, point, output), shape.tasks, source)
        tokens = sum(load.tokens for load in shape.loads)
        entry = {"series": point.series, "batch_size": point.batch_size, "tokens": tokens}
        result["series"].append(entry | scale_out(shape, point.method, parts, cluster))
        save(result, output / "scale-out.json")
    return result


def _measured(recipe: Recipe, phase: Phase, point: Point, output: Path) -> dict[str, float]:
    file = output / f"trace-{point.series.replace(' ', '-')}.json.gz"
    outcome = process.run(measure, Job(dumped(recipe), phase.name, point, timed=0, trace=str(file)))
    if outcome.result is None:
        raise UserError(f"{point}: {outcome.failed}")
    seconds: dict[str, float] = outcome.result["trace"]["seconds"]
    return seconds


def show(result: dict[str, Any], console: Console) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

    engine = result["settings"]["engine"]
    for entry in result["series"]:
        about = f"batch size {entry['batch_size']} and {entry['tokens']} tokens a rank"
        say(f"{result['recipe']}, {entry['series']}, ZeRO {engine['zero']}, {engine['precision']}, {about}", "bold")
        parts = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in entry["parts"].items())
        say(f"ms of one rank: {parts} ({entry['source']})")
        say(f"link {entry['link']['name']}: {entry['link']['source']}\n")
        console.print(_over_ranks(entry))
        say("ms of a step, the share of it spent waiting for collectives, and MB sent by a rank\n")
        console.print(_over_tasks(entry))
        say("ms of a step by number of tasks, ranks and reduce\n")


def _over_ranks(entry: dict[str, Any]) -> Table:
    ways = _ways(entry)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in ("ranks", *(header for way in ways for header in (way, "waits", "MB"))):
        table.add_column(header, justify="right", no_wrap=True)
    for world in sorted({point["ranks"] for point in entry["points"]}):
        row = [f"{world}"]
        for way in ways:
            point = _at(entry, way, entry["tasks"], world)
            waits = point["waiting"] / point["seconds"]
            row += [f"{1e3 * point['seconds']:.4g}", f"{waits:.0%}", f"{point['sent'] / 1e6:.4g}"]
        table.add_row(*row)
    return table


def _over_tasks(entry: dict[str, Any]) -> Table:
    ways = _ways(entry)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in ("tasks", *(f"{way} {world}" for world in SHOWN for way in ways)):
        table.add_column(header, justify="right", no_wrap=True)
    for tasks in sorted({point["tasks"] for point in entry["points"]}):
        points = [_at(entry, way, tasks, world) for world in SHOWN for way in ways]
        table.add_row(f"{tasks}", *(f"{1e3 * point['seconds']:.4g}" for point in points))
    return table


def _ways(entry: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(point["reduce"] for point in entry["points"]))


def _at(entry: dict[str, Any], way: str, tasks: int, world: int) -> dict[str, Any]:
    wanted = (way, tasks, world)
    return next(p for p in entry["points"] if (p["reduce"], p["tasks"], p["ranks"]) == wanted)
