"""The progress of the tokenisation of a large file on standard error: a bar, or lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastmtl.errors import one_line

SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def tokenization_progress(name: str, rows: int) -> Iterator[Callable[[int], None]]:
    """Provide a function that shows how many of a file's `rows` rows are tokenised.

    A terminal shows a progress bar. Elsewhere there is a line at most every SECONDS_BETWEEN_LINES
    seconds, and none for a file that takes less.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(name, rows).show
        return
    columns = [BarColumn(bar_width=24), TextColumn("{task.fields[done]}"), TimeElapsedColumn(), TextColumn("left")]
    title = TextColumn("{task.description}", markup=False)
    with Progress(title, *columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(one_line(f"tokenising {name}"), total=rows, done="")
        yield lambda done: bar.update(task, completed=done, done=f"{done:,}/{rows:,} rows")


class _Lines:
    def __init__(self, name: str, rows: int) -> None:
        self._name, self._rows = name, rows
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def show(self, done: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        print(one_line(f"fastmtl: {done:,} of {self._rows:,} rows of {self._name} tokenised"), file=sys.stderr)
