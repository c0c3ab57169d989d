"""Building of report.html from a run's config.yaml, metrics.jsonl and results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmtl.config import Recipe, TaskConfig, load_recipe
from fastmtl.engine.recipe_changes import CHANGES_FILE
from fastmtl.errors import UserError, listed
from fastmtl.files.json_files import read_json
from fastmtl.files.writing import replace_text
from fastmtl.inference.metrics import LOWER_IS_BETTER
from fastmtl.pages import page, plots
from fastmtl.report.gradients import gradient_parts
from fastmtl.report.phases import phase_table
from fastmtl.report.predictions import prediction_parts
from fastmtl.tracking.metrics_file import read_metrics
from fastmtl.tracking.titles import metric_columns, title_of

COLUMNS = 8  # metrics side by side on the page
SHARES = 12  # labels whose shares fit into a cell


def write_report(output: Path, results: dict[str, Any] | None = None) -> Path:
    """Write report.html to a run's directory and return its path.

    results: the result of `collect_results`. It is saved as results.json, from which a later call
    without it rebuilds the report. Raises UserError if the directory has no finished run.
    """
    kept = output / "results.json"
    if results is not None:
        _replace(kept, json.dumps(results, indent=1))
    elif not kept.is_file():
        raise UserError(f"{output} holds no finished run: there is no results.json")
    else:
        results = read_json(kept)
    config = output / "config.yaml"
    recipe = load_recipe(str(config))
    lines = read_metrics(output / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "dev" in line]
    body = [
        _head(output, recipe, results),
        page.section(
            "Dev scores", "The metric in bold is the task's own; the mean is over these.", [_scores(recipe, results)]
        ),
        page.section("Phases", "Steps count through the whole run.", phase_table(recipe, steps, evaluations)),
        page.section(
            "Loss",
            "Mean per row (tokens: per word), each on its own scale. Faint: the steps; strong: their moving average.",
            _losses(recipe, steps),
        ),
        page.section("Dev metrics over the run", "", _dev_curves(recipe, evaluations)),
        page.section(
            "Predictions on the dev rows",
            "Matrices: counts, and shares of the true class. Errors: the worst rows first.",
            prediction_parts(recipe, results),
        ),
        page.section(
            "Do the tasks agree?",
            "Cosines between the tasks' gradients of the shared parameters. Below zero two tasks pull against each "
            "other; the conflict rate is the share of such pairs.",
            gradient_parts(recipe, steps),
        ),
        page.section("Speed and schedule", "", _speed(steps)),
        page.section("Data", "", [_data(recipe, results)] if results["data"] else []),
        page.section("Resumed with other settings", "", _changes(output)),
        page.section("Versions and settings", "", [_versions(results)]),
        page.details("config.yaml: the complete recipe of this run", config.read_text(encoding="utf-8")),
    ]
    title = f"fastmtl: {output.resolve().name}"
    return _replace(output / "report.html", page.page(title, [part for part in body if part]))


def _replace(path: Path, text: str) -> Path:
    replace_text(path, text)
    return path


def _head(output: Path, recipe: Recipe, results: dict[str, Any]) -> str:
    engine = recipe.engine
    world = results["world_size"]
    values = {
        "mean dev score": "–" if results["mean"] is None else f"{results['mean']:.3f}",
        "gradient method": recipe.gradient.method,
        "adapter": recipe.adapter.summary,
        **({"LoRA": recipe.lora.summary} if recipe.lora.used else {}),
        "encoder": Path(recipe.encoder.path).name,
        "engine": f"ZeRO {engine.zero}, {engine.precision}",
        "processes": str(world),
        "optimiser steps": f"{results['steps']:,}",
        "time": _duration(results["seconds"]),
        "seed": str(recipe.seed),
    }
    return (
        f"<h1>{page.escape(output.resolve().name)}</h1>\n<p>{page.escape(recipe.description)}</p>\n{page.facts(values)}"
    )


def _scores(recipe: Recipe, results: dict[str, Any]) -> str:
    dev = results["dev"]
    caption = "Scores of the kept model" + ("" if results["mean"] is None else f", mean {results['mean']:.3f}")
    columns = metric_columns(recipe, dev)
    if len(columns) <= COLUMNS:
        rows = [[task, *(f"{values[m]:.3f}" if m in values else "" for m in columns)] for task, values in dev.items()]
        own = frozenset((number, 1 + columns.index(recipe.tasks[task].metric_name)) for number, task in enumerate(dev))
        return page.table(caption, ["task", *map(title_of, columns)], rows, own)
    rows = []
    for task, values in dev.items():
        chosen = recipe.tasks[task].metric_name
        others = ", ".join(f"{title_of(metric)} {value:.3f}" for metric, value in values.items() if metric != chosen)
        rows.append([task, title_of(chosen), f"{values[chosen]:.3f}", others])
    own = frozenset((number, 2) for number in range(len(rows)))
    return page.table(caption, ["task", "metric", "score", "other metrics"], rows, own, texts=True)


def _losses(recipe: Recipe, steps: list[dict[str, Any]]) -> list[str]:
    result = []
    for index, (name, task) in enumerate(recipe.tasks.items()):
        found = [line for line in steps if name in line["loss"]]
        if found:
            curve = ([line["step"] for line in found], [line["loss"][name] for line in found])
            svg = plots.curves({name: curve}, name=f"loss of {name}", ylabel=task.loss_name, first_color=index)
            result.append(page.figure(name, svg))
    words = [(line["step"], line["loss"]["mlm"]) for line in steps if "mlm" in line["loss"]]
    if words:
        curve = ([step for step, _ in words], [loss for _, loss in words])
        svg = plots.curves({"mlm": curve}, name="loss of masked words", ylabel="cross_entropy")
        result.append(page.figure("masked words", svg))
    return result


def _dev_curves(recipe: Recipe, evaluations: list[dict[str, Any]]) -> list[str]:
    if not evaluations:
        return []
    at = [line["step"] for line in evaluations]
    own = {
        f"{name} ({title_of(task.metric_name)})": (
            at,
            [line["dev"].get(name, {}).get(task.metric_name) for line in evaluations],
        )
        for name, task in recipe.tasks.items()
    }
    own["mean"] = (at, [line["mean"] for line in evaluations])
    result = [
        page.figure(
            "The tasks' own metrics",
            plots.curves(own, name="dev metrics", ylabel="score", smooth=False, markers=True, size=plots.WIDE),
        )
    ]
    for name in recipe.tasks:
        found = [line["dev"].get(name, {}) for line in evaluations]
        shown = dict.fromkeys(metric for values in found for metric in values if metric not in LOWER_IS_BETTER)
        curves = {title_of(metric): (at, [values.get(metric) for values in found]) for metric in shown}
        if curves:
            svg = plots.curves(
                curves, name=f"dev metrics of {name}", ylabel="score", smooth=False, markers=True, size=plots.TALL
            )
            result.append(page.figure(name, svg))
    return result


def _speed(steps: list[dict[str, Any]]) -> list[str]:
    if not steps:
        return []
    at = [line["step"] for line in steps]
    speed = {"tokens/s": (at, [line["tokens_per_second"] for line in steps])}
    rates = [line["lr"] if isinstance(line["lr"], dict) else {"learning rate": line["lr"]} for line in steps]
    names = dict.fromkeys(name for of_step in rates for name in of_step)
    lr = {name: (at, [of_step.get(name) for of_step in rates]) for name in names}
    return [
        page.figure("Throughput, all processes", plots.curves(speed, name="throughput", ylabel="tokens/s")),
        page.figure(
            "Learning rate", plots.curves(lr, name="learning rate", ylabel="lr", smooth=False, size=plots.TALL)
        ),
    ]


def _data(recipe: Recipe, results: dict[str, Any]) -> str:
    rows = [
        [
            f"{task}, {split}",
            *(f"{counts[key]:,}" for key in ("rows", "skipped", "truncated")),
            _labels(recipe.tasks[task], counts.get("labels", {})),
        ]
        for task, splits in results["data"].items()
        for split, counts in splits.items()
    ]
    head = ["file", "rows", "bad rows skipped", "texts truncated", "labels"]
    return page.table("Rows read", head, rows, frozenset())


def _changes(output: Path) -> list[str]:
    file = output / CHANGES_FILE
    if not file.is_file():
        return []
    lines = read_metrics(file)
    rows = [
        [f"{key}", str(line["step"]), str(before), str(now)]
        for line in lines
        for key, (before, now) in line["changes"].items()
    ]
    return [
        page.table("Changes when the run was resumed", ["setting", "after step", "before", "now"], rows, frozenset())
    ]


def _labels(task: TaskConfig, labels: dict[str, float]) -> str:
    """Return the shares of the labels, or other numbers about them.

    labels: whole numbers are counts, of which the result has the shares.
    """
    if not all(isinstance(value, int) for value in labels.values()):
        return ", ".join(f"{name} {value:.3g}" for name, value in labels.items())
    total = sum(labels.values())
    names = task.label_names if len(task.label_names or ()) == len(labels) else labels
    shares = [f"{name}: {n / max(total, 1):.1%}" for name, n in zip(names or labels, labels.values(), strict=True)]
    return listed(shares, SHARES)


def _versions(results: dict[str, Any]) -> str:
    rows = [[name, version] for name, version in results["versions"].items()]
    return page.table(f"Finished {results['finished']}", ["package", "version"], rows, frozenset())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
