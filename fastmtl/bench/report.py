"""Results as tables and as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastmtl.bench.surgery import TASK_VARIANTS
from fastmtl.errors import UserError


def check_file(path: Path | None) -> None:
    """Raises UserError where the result could not be written: said before minutes of measuring, not after."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json: cannot write {path}: give a file in a directory that exists")


def save(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(result: dict[str, Any], console: Console) -> None:
    """The table of a result of bench_variants or bench_tasks."""
    table = _tasks(result) if "points" in result else _variants(result)
    console.print(table)
    for name, reason in result.get("skipped", {}).items():
        console.print(f"{name}: skipped, {reason}", highlight=False, markup=False)
    about = result["environment"]
    line = f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {result['rounds']} rounds"
    console.print(line, highlight=False, markup=False)


def _variants(result: dict[str, Any]) -> Table:
    title = (
        f"{result['shape']['name']}, {result['tasks']} tasks x {result['shape']['rows']} sequences, "
        f"{result['tokens']} tokens ({result['padded_tokens']} padded)"
    )
    headers = ("variant", "median s", "20 %", "80 %", "to joint", "to textbook", "MiB above joint", "J MiB")
    table = _table(title, *headers)
    for name, entry in result["variants"].items():
        table.add_row(
            name,
            *_seconds(entry),
            f"{entry['ratio_to_joint']:.2f}x",
            f"{entry['ratio_to_textbook']:.2f}x",
            _mib(entry["peak_above_joint_mib"]),
            _mib(entry["j_mib"]),
        )
    return table


def _tasks(result: dict[str, Any]) -> Table:
    table = _table(
        f"{result['shape']['name']}, more tasks in the same number of tokens",
        *("tasks", "tokens", "variant", "median s", "20 %", "80 %", f"to {result['points'][0]['tasks']} tasks"),
    )
    for point in result["points"]:
        for name in TASK_VARIANTS:
            entry = point[name]
            table.add_row(
                str(point["tasks"]), str(point["tokens"]), name, *_seconds(entry), f"{entry['relative']:.2f}x"
            )
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header == "variant" else "right", no_wrap=True)
    return table


def _seconds(entry: dict[str, Any]) -> list[str]:
    return [f"{entry[key]:.3f}" for key in ("median_s", "p20_s", "p80_s")]


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
