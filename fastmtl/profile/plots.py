"""Figures of a profile, as SVG files in which text stays text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastmtl.errors import UserError
from fastmtl.measure.parts import PARTS
from fastmtl.measure.result_file import ORIGIN

MIB = 2**20
SCALE_TASKS = (2, 8, 32)
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b8b8b8")


class NoOrigin(UserError):
    """Raised for a result that lacks the machine, versions or commit it was measured with."""


def draw(result: dict[str, Any], directory: Path) -> list[Path]:
    """Draw memory.svg, throughput.svg and methods.svg of the measured points; return the files.

    Without measured points nothing is drawn. Raises NoOrigin if the result lacks its device,
    driver, versions, commit, or whether the tree was clean.
    """
    check_origin(result)
    points = [point for point in result["points"] if point["measured"] is not None]
    if not points:
        return []
    pictures: dict[str, tuple[float, float, Callable[[Any, Sequence[dict[str, Any]]], None]]] = {
        "memory": (1.6 + 2.6 * len(_series(points)), 3.6, _memory),
        "throughput": (5.0, 3.4, _throughput),
        "methods": (5.0, 3.4, _methods),
    }
    files = []
    with _style():
        for name, (width, height, picture) in pictures.items():
            files.append(_save(directory / f"{name}.svg", result, points, (width, height), picture))
    return files


def draw_scale_out(result: dict[str, Any], directory: Path) -> Path:
    """Draw scale-out.svg: a step's time over ranks, by number of tasks. Raises NoOrigin."""
    check_origin(result)
    with _style():
        size = (2.2 + 2.4 * len(SCALE_TASKS), 3.4)
        return _save(directory / "scale-out.svg", result, result["series"], size, _scale_out)


def check_origin(result: dict[str, Any]) -> None:
    about = result.get("environment") or {}
    missing = [key for key in ORIGIN if about.get(key) is None]
    missing += [] if about.get("driver") is not None or about.get("cuda") is None and "driver" in about else ["driver"]
    if missing:
        raise NoOrigin(
            f"no figure can be drawn: the result does not name its {', '.join(missing)}: profile again in a git "
            "checkout, or with --commit"
        )


def _style() -> AbstractContextManager[None]:
    import matplotlib

    # Equal results give equal files.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "fastmtl", "font.size": 9, "axes.spines.top": False}
    return matplotlib.rc_context({**style, "axes.spines.right": False})


def _save(
    file: Path,
    result: dict[str, Any],
    points: Sequence[dict[str, Any]],
    size: tuple[float, float],
    picture: Callable[[Any, Sequence[dict[str, Any]]], None],
) -> Path:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    picture(figure, points)
    about = result["environment"]
    where = f"{about['threads']} threads" if about["driver"] is None else f"driver {about['driver']}"
    state = "" if about["clean"] else ", with changes"
    figure.supxlabel(
        f"{result['recipe']} on {about['device']}, {where}, torch {about['torch']}, "
        f"fastmtl {about['commit'][:12]}{state}",
        fontsize=6,
        color="#666666",
    )
    try:
        figure.savefig(file, metadata={"Date": None})
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    return file


def _memory(figure: Any, points: Sequence[dict[str, Any]]) -> None:
    """Draw a bar for every point, stacked by part, with the prediction as a mark."""
    series = _series(points)
    panes = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for axes, (name, entries) in zip(panes, series.items(), strict=True):
        places = range(len(entries))
        bottom = [0.0] * len(entries)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            heights = [entry["measured"]["parts"][part] / MIB for entry in entries]
            axes.bar(places, heights, 0.7, bottom=bottom, color=colour, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        predicted = [entry["predicted"]["bytes"] / MIB for entry in entries]
        axes.plot(places, predicted, "k_", markersize=16, label="predicted")
        axes.set_xticks(places, [str(entry["batch_size"]) for entry in entries])
        axes.set(title=name, xlabel="batch size")
    panes[0].set_ylabel("MiB at the peak")
    handles, labels = panes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)


def _throughput(figure: Any, points: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots()
    for name, entries in _series(points).items():
        sizes = [entry["batch_size"] for entry in entries]
        axes.plot(sizes, [entry["measured"]["tokens_per_s"] for entry in entries], "o-", label=name)
    axes.set(xlabel="batch size", ylabel="real tokens/s", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _methods(figure: Any, points: Sequence[dict[str, Any]]) -> None:
    """Draw memory of a step against its time: down and left is better."""
    axes = figure.subplots()
    for name, entries in _series(points).items():
        x = [1e3 * entry["measured"]["seconds"]["median_s"] for entry in entries]
        y = [entry["measured"]["bytes"] / MIB for entry in entries]
        axes.plot(x, y, "o-", label=name)
        for entry, place in zip(entries, zip(x, y, strict=True), strict=True):
            axes.annotate(f"{entry['batch_size']}", place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="ms per step", ylabel="peak MiB", xlim=(0, None), ylim=(0, None))
    axes.set_title("each point: a batch size", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _scale_out(figure: Any, series: Sequence[dict[str, Any]]) -> None:
    panes = figure.subplots(1, len(SCALE_TASKS), sharey=True)
    for axes, tasks in zip(panes, SCALE_TASKS, strict=True):
        for entry in series:
            for way in dict.fromkeys(point["reduce"] for point in entry["points"]):
                points = [p for p in entry["points"] if (p["reduce"], p["tasks"]) == (way, tasks)]
                name = way if way == "sum" else f"{entry['series']} {way}"
                axes.plot([p["ranks"] for p in points], [1e3 * p["seconds"] for p in points], ".-", label=name)
        axes.set(title=f"{tasks} tasks", xlabel="ranks", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panes[0].set_ylabel("ms per step, predicted")
    handles, labels = panes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    link = series[0]["link"]["name"]
    figure.suptitle(f"link {link}; parts of a step: {series[0]['source']}", fontsize=7)


def _series(points: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault(point["series"], []).append(point)
    return found
