"""The progress of a run, as a bar on a terminal or as lines in a log, and the table of scores."""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastmtl.config import Recipe
from fastmtl.errors import printable
from fastmtl.tracking.titles import metric_columns, title_of

SECONDS_BETWEEN_LINES = 5.0


class LastingConsole(Console):
    """A console that becomes silent when the program that reads its output ends.

    An example is `fastmtl train ... | head`. Rich's own console would end the process.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Display(Protocol):
    def update(self, step: int, epoch: int, summary: str | None) -> None:
        """Show that optimiser step `step` is done.

        epoch: from 0. summary: the step's losses and rates, None if they have not been read.
        """

    def message(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None: ...


class BarDisplay:
    """A progress bar, with the newest summary after it."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[summary]}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, epoch=1, summary="")
        self._progress.start()

    def update(self, step: int, epoch: int, summary: str | None) -> None:
        self._progress.update(self._task, completed=step, epoch=epoch + 1)
        if summary is not None:
            self._progress.update(self._task, summary=summary)

    def message(self, text: str) -> None:
        self._progress.console.print(printable(text), highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


class LineDisplay:
    """A line for the first and last step; others at most every SECONDS_BETWEEN_LINES seconds."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._next = 0.0

    def update(self, step: int, epoch: int, summary: str | None) -> None:
        now = time.monotonic()
        if summary is not None and (now >= self._next or step == self._total):
            self._next = now + SECONDS_BETWEEN_LINES
            self.message(f"epoch {epoch + 1}  step {step}/{self._total}  {summary}")

    def message(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        pass


def open_display(console: Console, total_steps: int, first_step: int) -> Display:
    """Return a progress bar if the console is a terminal, else a display of lines."""
    return BarDisplay(console, total_steps, first_step) if console.is_terminal else LineDisplay(console, total_steps)


def summarize(losses: dict[str, float], conflict_rate: float | None, tokens_per_second: float) -> str:
    """Return a line like `sst 1.204  para 0.502  conflicts 33 %  2.4k tokens/s`."""
    parts = [f"{name} {loss:.3f}" for name, loss in losses.items()]
    if conflict_rate is not None:
        parts.append(f"conflicts {conflict_rate:.0%}".replace("%", " %"))
    rate = f"{tokens_per_second / 1000:.1f}k" if tokens_per_second >= 1000 else f"{tokens_per_second:.0f}"
    return "  ".join([*parts, f"{rate} tokens/s"])


# Metrics that metrics.jsonl, results.json and the report have, but the terminal has no room for.
HIDDEN = frozenset({"macro_precision", "macro_recall", "mse"})
COLUMNS = 5  # metrics side by side within 80 characters


def scores_table(recipe: Recipe, metrics: dict[str, dict[str, float]], mean: float | None, title: str) -> Table:
    """Return a table of the tasks' metrics; few have columns of their own, many are listed.

    metrics: {task: {metric: value}}. mean: the mean over tasks of each task's own metric, for the
    caption. The tasks' own metrics are bold.
    """
    shown = [name for name in metric_columns(recipe, metrics) if name not in HIDDEN]
    own = ", ".join(f"{task} {recipe.tasks[task].metric_name}" for task in metrics)
    caption = None if mean is None else f"mean {mean:.3f} ({own})"
    table = Table(
        title=Text(printable(title), "italic"),
        title_justify="left",
        caption=None if caption is None else Text(caption, "dim italic"),
        caption_justify="left",
    )
    table.add_column("task")
    wide = len(shown) <= COLUMNS
    for name in shown if wide else ():
        table.add_column(title_of(name), justify="right")
    if not wide:
        for head in ("metric", "score", "other metrics"):
            table.add_column(head, justify="right" if head == "score" else "left")
    for task, values in metrics.items():
        chosen = recipe.tasks[task].metric_name
        if wide:
            cells = [f"{values[name]:.3f}" if name in values else "" for name in shown]
            bold = [f"[bold]{cell}[/bold]" if name == chosen else cell for name, cell in zip(shown, cells, strict=True)]
            table.add_row(Text(task), *bold)
        else:
            others = [name for name in values if name in shown and name != chosen]
            listed = ", ".join(f"{title_of(name)} {values[name]:.3f}" for name in others)
            table.add_row(Text(task), title_of(chosen), f"[bold]{values[chosen]:.3f}[/bold]", listed)
    return table
