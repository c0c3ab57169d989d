"""Plots as SVG inside the page. CSS variables give the colours, for a light or a dark page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders that matplotlib writes into the SVG; `_svg` replaces them by the page's variables.
TEXT, GRID = "#010203", "#010204"
SERIES = tuple(f"#0102{10 + index:02x}" for index in range(8))
BINS = 300
SMALL, TALL, WIDE = (3.3, 2.2), (3.3, 2.7), (6.9, 2.8)  # inches; three small plots fill a line of the page

Curve = tuple[Sequence[float], Sequence[float | None]]


def plain(text: str) -> str:
    """Return a label that matplotlib shows literally.

    Otherwise text between two `$` would be a formula, and a label that begins with `_` would be
    hidden.
    """
    escaped = text.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def curves(
    series: Mapping[str, Curve],
    *,
    name: str,
    ylabel: str,
    xlabel: str = "optimiser step",
    smooth: bool = True,
    size: tuple[float, float] = SMALL,
    zero_line: bool = False,
    ylim: tuple[float, float] | None = None,
    log: bool = False,
    markers: bool = False,
    first_color: int = 0,
) -> str:
    """Return the SVG of curves over the optimiser step, or over what `xlabel` names.

    series: {name of a curve: (steps, values)}, with None for a missing value. name: the plot's name
    for screen readers. smooth: draw the values faintly, and their moving average strongly.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes: Axes) -> None:
        for index, (name_of_curve, (steps, values)) in enumerate(series.items()):
            label = plain(name_of_curve)
            color = SERIES[(first_color + index) % len(SERIES)]
            x, y = np.asarray(steps, dtype=float), np.asarray([np.nan if v is None else v for v in values], dtype=float)
            x, y = _binned(x, y)
            if smooth:
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
                axes.plot(x, _moving_average(y), color=color, linewidth=1.7, label=label)
            else:
                axes.plot(x, y, color=color, linewidth=1.7, marker="o" if markers else "", markersize=4, label=label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(plain(ylabel))
        if zero_line:
            axes.axhline(0, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
        if ylim is not None:
            axes.set_ylim(*ylim)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(series) > 1:
            place = "outside lower center" if size[0] < WIDE[0] else "outside right center"
            columns = 2 if size[0] < WIDE[0] else 1
            figure: Any = axes.figure
            figure.legend(loc=place, ncols=columns, frameon=False, labelcolor=TEXT)

    return _plot(name, size, draw)


def scatter(labels: Sequence[float], scores: Sequence[float], limits: tuple[float, float], *, name: str) -> str:
    """Return the SVG of predictions over labels, with the line where both are equal.

    limits: the smallest and the largest label. name: the plot's name for screen readers.
    """

    def draw(axes: Axes) -> None:
        margin = 0.04 * (limits[1] - limits[0])
        low = min(limits[0], float(np.min(scores))) - margin
        high = max(limits[1], float(np.max(scores))) + margin
        axes.plot(limits, limits, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot(labels, scores, linestyle="none", marker="o", markersize=3, color=SERIES[0], alpha=0.35, mew=0)
        axes.set_xlim(limits[0] - margin, limits[1] + margin)
        axes.set_ylim(low, high)
        axes.set_xlabel("label")
        axes.set_ylabel("prediction")

    return _plot(name, (3.3, 3.0), draw)


def _plot(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which may need a display and has global state

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # ids differ between plots of a page but not between builds
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.5,
        "axes.axisbelow": True,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        return _svg(figure, name)


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # matplotlib's ids of groups are unique only within a figure
    text = re.sub(r'\bid="((?:figure|axes|patch|line2d|text|xtick|ytick|legend|matplotlib)[^"]*)"', "", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    for placeholder, variable in [(TEXT, "ink"), (GRID, "rule"), *((c, f"s{i}") for i, c in enumerate(SERIES))]:
        text = text.replace(placeholder, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y, averaged over groups of neighbours so that at most BINS points remain.

    A group without finite values is NaN.
    """
    if len(x) <= BINS:
        return x, y
    parts = np.array_split(np.arange(len(x)), BINS)
    means = [float(np.nanmean(y[part])) if np.isfinite(y[part]).any() else np.nan for part in parts]
    return np.array([x[part].mean() for part in parts]), np.array(means)


def _moving_average(y: np.ndarray) -> np.ndarray:
    """Return the centred moving average over a twentieth of the points.

    NaN does not count in an average, and stays NaN.
    """
    window = max(3, len(y) // 20) | 1
    kernel = np.ones(window)
    valid = np.isfinite(y)
    total = np.convolve(np.where(valid, y, 0.0), kernel, "full")[window // 2 : window // 2 + len(y)]
    count = np.convolve(valid.astype(float), kernel, "full")[window // 2 : window // 2 + len(y)]
    return np.divide(total, count, out=np.full(len(y), np.nan), where=(count > 0) & valid)
