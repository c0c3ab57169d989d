"""Results as tables and as a file, and what is said while one is measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastmtl.bench.gradients import COPY
from fastmtl.bench.harness import Say
from fastmtl.errors import UserError

# Columns of text; the others are numbers.
TEXTS = ("step", "variant", "operation", "impl", "dtype")


@contextmanager
def progress() -> Iterator[Say]:
    """On a terminal one line of it that changes; elsewhere (a log, a pipe) a line for each step with its time."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("", refresh_per_second=1) as status:
            yield status.update
        return
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {text}", file=sys.stderr, flush=True)

    yield say


def check_file(path: Path | None) -> None:
    """Raises UserError where the result could not be written: said before minutes of measuring, not after."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json: cannot write {path}: give a file in a directory that exists")


def save(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(result: dict[str, Any], console: Console) -> None:
    """The table of a result of bench_variants, bench_tasks, bench_step or bench_gradients."""
    kinds = {"dtypes": _gradients, "points": _tasks, "steps": _steps, "variants": _variants}
    console.print(next(table(result) for key, table in kinds.items() if key in result))
    left_out = {**result.get("skipped", {}), **result.get("unavailable", {})}
    for name, reason in left_out.items():
        console.print(f"{name}: left out, {reason}", highlight=False, markup=False)
    about = result["environment"]
    where = f"{about['threads']} threads" if about["driver"] is None else f"driver {about['driver']}"
    line = f"{about['device']}, {where}, torch {about['torch']}, {result['rounds']} rounds"
    console.print(line, highlight=False, markup=False)


def _variants(result: dict[str, Any]) -> Table:
    title = (
        f"{result['shape']['name']} in {result['precision']}, {result['tasks']} tasks, {result['tokens']} tokens "
        f"({result['padded_tokens']} padded)"
    )
    headers = ("variant", "median ms", "20 %", "80 %", "to joint", "to textbook", "MiB above joint", "J MiB")
    table = _table(title, *headers)
    for name, entry in result["variants"].items():
        table.add_row(
            name,
            *_milliseconds(entry),
            f"{entry['ratio_to_joint']:.2f}x",
            f"{entry['ratio_to_textbook']:.2f}x",
            _mib(entry["peak_above_joint_mib"]),
            _mib(entry["j_mib"]),
        )
    return table


def _steps(result: dict[str, Any]) -> Table:
    table = _table(
        f"{result['shape']['name']} in {result['precision']}, {result['tasks']} tasks, {result['tokens']} tokens "
        f"({result['padded_tokens']} padded), dropout {result['dropout']}",
        *("step", "median ms", "20 %", "80 %", "real tokens/s", "to transformers", "to the products"),
    )
    for name, entry in result["steps"].items():
        table.add_row(
            name,
            *_milliseconds(entry),
            f"{result['tokens'] / entry['median_s']:,.0f}",
            f"{entry['ratio_to_transformers']:.2f}x",
            f"{entry['ratio_to_products']:.2f}x",
        )
    return table


def _tasks(result: dict[str, Any]) -> Table:
    first, *_ = points = result["points"]
    table = _table(
        f"{result['shape']['name']} in {result['precision']}, more tasks in the same number of tokens",
        *("tasks", "tokens", "variant", "median ms", "20 %", "80 %", f"to {first['tasks']} tasks"),
    )
    for name in [name for name in first if name not in ("tasks", "tokens")]:
        for point in points:
            entry = point[name]
            row = (str(point["tasks"]), str(point["tokens"]), name)
            table.add_row(*row, *_milliseconds(entry), f"{entry['relative']:.2f}x")
    return table


def _gradients(result: dict[str, Any]) -> Table:
    table = _table(
        f"{result['tasks']} tasks x {result['columns']:,} numbers; both: gramian and combine",
        *("dtype", "operation", "impl", "median ms", "20 %", "80 %", "GB/s", f"of the {COPY}"),
    )
    for dtype, operations in result["dtypes"].items():
        for operation, impls in operations.items():
            for impl, entry in impls.items():
                row = (dtype, operation, impl, *_milliseconds(entry))
                table.add_row(*row, f"{entry['gb_per_s']:.1f}", f"{entry['share_of_copy']:.0%}")
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header in TEXTS else "right", no_wrap=True)
    return table


def _milliseconds(entry: dict[str, Any]) -> list[str]:
    return [f"{1e3 * entry[key]:.2f}" for key in ("median_s", "p20_s", "p80_s")]


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
