"""Figures of benchmarks as SVG files: a roofline for kernels, bars for steps, lines for sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmtl.errors import UserError
from fastmtl.measure.result_file import ORIGIN

# Beginnings of the names of steps that are not fastmtl's.
OTHERS = ("transformers", "textbook", "torchjd", "TorchJD", "matrix products")


def plot(result: dict[str, Any], directory: Path) -> list[Path]:
    """Draw the figures of a result as SVG files in `directory`, and return their paths.

    The directory is created. Raises UserError if the result does not name the device, versions and
    commit that it was measured with, or if the directory cannot be written.
    """
    about = result.get("environment", {})
    missing = [key for key in ORIGIN if about.get(key) is None]
    if "driver" not in about:
        missing.append("driver")
    if missing:
        raise UserError(
            f"no figure can be drawn: the result does not name its {', '.join(missing)}: "
            "measure it again with `fastmtl bench`, in a git checkout or with --commit"
        )
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, so that files are small and searchable. With a fixed salt, equal results give
    # equal files.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastmtl", "font.size": 9})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_draw(result, kind, directory) for kind in _kinds(result)]
    except OSError as error:
        raise UserError(f"--plot: cannot write to {directory}: {error.strerror}") from None


def _kinds(result: dict[str, Any]) -> list[Callable[[Any, dict[str, Any]], str]]:
    """Return the functions for a result's figures: each draws on axes and returns a file name."""
    if "operations" in result:
        return [_roofline, _to_eager]
    if "points" in result:
        return [_sweep] if "steps" in result["points"][0] else [_points]
    return [_bars]


def _draw(result: dict[str, Any], kind: Callable[[Any, dict[str, Any]], str], directory: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    name = kind(axes, result)
    about = result["environment"]
    dirty = "" if about["clean"] else ", with changes"
    threads = f"{about['threads']} threads" if about["driver"] is None else f"driver {about['driver']}"
    figure.supxlabel(
        f"{about['device']}, {threads}, torch {about['torch']}, fastmtl {about['commit'][:12]}{dirty}", fontsize=7
    )
    path = directory / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def _roofline(axes: Any, result: dict[str, Any]) -> str:
    """Plot operations per second over operations per byte to move, for forward plus backward."""
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    peak = 1e3 * result["gemm"]["tflop_per_s"]
    found = {}
    for name, operation in result["operations"].items():
        whole = "both" if "both" in operation["passes"] else "forward"
        if whole not in operation["work"]:
            continue
        work = operation["work"][whole]
        found[name] = (work["flops"] / work["bytes"], operation["passes"][whole])
    memory = max(ways["copy"]["gb_per_s"] for _, ways in found.values())
    intensities = [intensity for intensity, _ in found.values()]
    left, right = min(intensities) / 2, max(*intensities, 2 * peak / memory)
    axes.plot([left, peak / memory, right], [left * memory, peak, peak], color="black", linewidth=1)
    for index, (name, (intensity, ways)) in enumerate(found.items()):
        colour = palette(index % 20)
        own = {entry["median_s"]: way for way, entry in ways.items() if way.startswith("fastmtl ")}
        best = own[min(own)] if own else None
        for way, marker in ((best, "o"), ("eager", "x")):
            if way in ways:
                label = f"{name}, {way}" if marker == "o" else None
                axes.plot(intensity, 1e3 * ways[way]["tflop_per_s"], marker, color=colour, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="GFLOP/s",
        title=f"Kernels under the roof of the best copy and a matrix product, {_size(result)}; x: eager torch",
    )
    axes.legend(fontsize=7, loc="lower right")
    return "roofline"


def _to_eager(axes: Any, result: dict[str, Any]) -> str:
    """Plot the times of all implementations, relative to that of eager torch."""
    labels, values, colours = [], [], []
    for name, operation in result["operations"].items():
        ways = operation["passes"]["both" if "both" in operation["passes"] else "forward"]
        for way, entry in ways.items():
            if entry["ratio_to_eager"] is not None and way not in ("copy", "eager", "fastmtl reference"):
                labels.append(f"{name}: {way}")
                values.append(entry["ratio_to_eager"])
                colours.append("C0" if way.startswith("fastmtl") else "C7")
    axes.barh(labels, values, color=colours)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xscale="log", xlabel="time over eager torch's, forward and backward", title=f"Kernels, {_size(result)}")
    return "kernels"


def _bars(axes: Any, result: dict[str, Any]) -> str:
    entries = next(result[key] for key in ("steps", "variants", "peers", "ways") if key in result)
    medians = [1e3 * entry["median_s"] for entry in entries.values()]
    spread = [
        [1e3 * (entry["median_s"] - entry["p20_s"]) for entry in entries.values()],
        [1e3 * (entry["p80_s"] - entry["median_s"]) for entry in entries.values()],
    ]
    axes.barh(list(entries), medians, xerr=spread, color=["C0" if _own(name) else "C7" for name in entries])
    axes.invert_yaxis()
    axes.set(xlabel="ms, median with 20 and 80 % quantiles", title=f"{result['benchmark']}, {_size(result)}")
    return _file(result)


def _points(axes: Any, result: dict[str, Any]) -> str:
    points = result["points"]
    for name in (key for key, value in points[0].items() if isinstance(value, dict)):
        axes.plot([point["tasks"] for point in points], [1e3 * p[name]["median_s"] for p in points], "o-", label=name)
    axes.set(xlabel="tasks", ylabel="ms", ylim=(0, None), title=f"{result['benchmark']}, {_size(result)}")
    axes.legend()
    return "surgery-tasks"


def _sweep(axes: Any, result: dict[str, Any]) -> str:
    points = result["points"]
    for name in points[0]["steps"]:
        speeds = [point["tokens"] / point["steps"][name]["median_s"] for point in points]
        axes.plot([point["name"] for point in points], speeds, "o-", label=name)
    axes.set(ylabel="real tokens/s", ylim=(0, None), title=f"{result['benchmark']}, {result['shape']['name']}")
    axes.legend()
    return _file(result)


def _file(result: dict[str, Any]) -> str:
    return result["benchmark"].replace(" --sweep", "").replace(" ", "-") + f"-{result['shape']['name']}"


def _own(name: str) -> bool:
    return not name.startswith(OTHERS)


def _size(result: dict[str, Any]) -> str:
    return f"{result['shape']['name']} in {result['precision']}"
