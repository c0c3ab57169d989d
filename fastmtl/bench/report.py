"""Output of the benchmarks: progress messages, tables on a terminal, and result files."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastmtl.bench.compare import Change
from fastmtl.errors import UserError
from fastmtl.measure.harness import Keep, Say
from fastmtl.measure.result_file import UNFINISHED, save

KEPT = ("kept_bytes_per_token", "kept_bytes_per_token_and_layer")
# Headers of the columns with text; the others have numbers.
TEXTS = ("step", "variant", "operation", "impl", "dtype", "what", "verdict")


@contextmanager
def progress() -> Iterator[Say]:
    """Yield a function that shows a progress message.

    On a terminal each message replaces the one before. Elsewhere each message is a line with the
    seconds since the start.
    """
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
    """Raise UserError if `path` cannot be written. Call this before minutes of measuring."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json: cannot write {path}: give a file in a directory that exists")


def keeper(path: Path | None) -> Keep | None:
    """Return a function that saves a result as unfinished in `path`; None if there is no path."""
    if path is None:
        return None
    return lambda result: save({**result, UNFINISHED: True}, path)


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result of any benchmark of `fastmtl bench` as tables."""
    for name, operation in result.get("operations", {}).items():
        console.print(_operation(name, operation))
        _print_skipped(operation["skipped"], console)
        console.print()
    points = result.get("points", [])
    if points and "steps" not in points[0]:
        console.print(_tasks(result))
    for point in points:
        if "steps" in point:
            console.print(_steps({**result, **point}))
            _print_skipped(point["skipped"], console)
            console.print()
    for key, table in {"steps": _steps, "variants": _variants, "peers": _peers, "ways": _ways}.items():
        if key in result:
            console.print(table(result))
    _print_skipped(result.get("skipped", {}), console)
    if "gemm" in result:
        gemm = result["gemm"]
        line = f"{1e3 * gemm['tflop_per_s']:,.0f} GFLOP/s, a product of {gemm['width']:,} x {gemm['width']:,} matrices"
        console.print(f"of GEMM: relative to {line} in {result['precision']}", highlight=False)
    about = result["environment"]
    where = f"{about['threads']} threads" if about["driver"] is None else f"driver {about['driver']}"
    line = f"{about['device']}, {where}, torch {about['torch']}, {result['rounds']} rounds"
    console.print(line, highlight=False, markup=False)


def show_changes(changes: Sequence[Change], old: dict[str, Any], new: dict[str, Any], console: Console) -> None:
    """Print the changes of times as a table, and the fields that differ in the environments."""
    table = _table("", *("what", "old ms", "new ms", "ratio", "noise", "verdict"))
    for change in changes:
        noise = f"±{change.noise:.0%}"
        row = (change.name, f"{1e3 * change.old_s:.3f}", f"{1e3 * change.new_s:.3f}", f"{change.ratio:.2f}x", noise)
        table.add_row(*row, change.verdict)
    console.print(table)
    for key in sorted(old["environment"].keys() & new["environment"].keys()):
        before, now = old["environment"][key], new["environment"][key]
        if before != now:
            console.print(f"{key}: {before} before, {now} now", highlight=False, markup=False)


def wide() -> Console:
    """Return a console as wide as the terminal, or with 160 columns for a file or a pipe."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=160)


def _print_skipped(reasons: dict[str, str], console: Console) -> None:
    for name, reason in reasons.items():
        console.print(f"{name}: skipped, {reason}", highlight=False, markup=False)


def _operation(name: str, operation: dict[str, Any]) -> Table:
    """Return a table: the time of each pass; the other columns are for all passes together."""
    passes = operation["passes"]
    dropout = f", dropout {operation['dropout']}" if operation["dropout"] else ""
    whole = "both" if "both" in passes else "forward"
    table = _table(
        f"{name}: {operation['about']}{dropout}",
        *("impl", *(f"{key} ms" for key in passes), "20 %", "80 %", "to eager", "tokens/s"),
        *("GB/s", "of copy", "GFLOP/s", "of GEMM", "MiB"),
    )
    for impl, entry in passes[whole].items():
        table.add_row(
            impl,
            *(f"{1e3 * passes[key][impl]['median_s']:.3f}" for key in passes),
            *(f"{1e3 * entry[key]:.3f}" for key in ("p20_s", "p80_s")),
            _number(entry["ratio_to_eager"], "{:.2f}x"),
            _number(entry["tokens_per_s"], "{:,.0f}"),
            _number(entry.get("gb_per_s"), "{:.1f}"),
            _number(entry.get("share_of_copy"), "{:.0%}"),
            _number(_giga(entry.get("tflop_per_s")), "{:,.1f}"),
            _number(entry.get("share_of_gemm"), "{:.0%}"),
            _number(operation["peak_mib"].get(impl), "{:.0f}"),
        )
    return table


def _giga(tera: float | None) -> float | None:
    return None if tera is None else 1e3 * tera


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _variants(result: dict[str, Any]) -> Table:
    model = f"{result['model']}, " if "model" in result else ""
    title = (
        f"{model}{result['shape']['name']} in {result['precision']}, {result['tasks']} tasks, "
        f"{result['tokens']} tokens ({result['padded_tokens']} padded)"
    )
    headers = ("variant", "median ms", "20 %", "80 %", "to joint", "to textbook", "MiB above joint", "J MiB")
    table = _table(title, *headers)
    for name, entry in result["variants"].items():
        table.add_row(
            name,
            *_milliseconds(entry),
            f"{entry['ratio_to_joint']:.2f}x",
            _number(entry["ratio_to_textbook"], "{:.2f}x"),
            _mib(entry["peak_above_joint_mib"]),
            _mib(entry["j_mib"]),
        )
    return table


def _peers(result: dict[str, Any]) -> Table:
    shape = result["shape"]
    table = _table(
        f"{shape['name']} in {result['precision']}, {result['tasks']} tasks x {shape['rows']} texts",
        *("step", "median ms", "20 %", "80 %", "time", "MiB with AdamW", "memory"),
        f"texts in {result['limit_gib']:g} GiB, {result['largest']}",
    )
    for name, entry in result["peers"].items():
        table.add_row(
            name,
            *_milliseconds(entry),
            f"{entry['ratio_to_joint']:.2f}x",
            f"{entry['memory_mib']:,.0f}",
            f"{entry['memory_to_joint']:.2f}x",
            f"{result['tasks']} x {entry['largest_rows']:,}",
        )
    return table


def _ways(result: dict[str, Any]) -> Table:
    table = _table(
        f"{result['shape']['name']} in {result['precision']}, {result['tasks']} tasks, {result['tokens']} tokens, "
        f"dropout {result['dropout']}, DeepSpeed with ZeRO {result['zero']}",
        *("step", "median ms", "20 %", "80 %", "real tokens/s", "MiB"),
    )
    for name, entry in result["ways"].items():
        table.add_row(name, *_milliseconds(entry), f"{entry['tokens_per_s']:,.0f}", _mib(entry["peak_mib"]))
    return table


def _steps(result: dict[str, Any]) -> Table:
    """Return a table of steps.

    Its last columns are kept bytes if they were counted, else operator calls.
    """
    counted = any("kept_bytes_per_token" in entry for entry in result["steps"].values())
    table = _table(
        f"{result['shape']['name']} in {result['precision']}, {result['tasks']} tasks, {result['tokens']} tokens "
        f"({result['padded_tokens']} padded), dropout {result['dropout']}",
        *("step", "median ms", "20 %", "80 %", "real tokens/s", "to transformers", "to the products"),
        *(("kept bytes/token", "of a layer") if counted else ("operator calls", "without AdamW", "to transformers")),
    )
    for name, entry in result["steps"].items():
        table.add_row(
            name,
            *_milliseconds(entry),
            f"{result['tokens'] / entry['median_s']:,.0f}",
            f"{entry['ratio_to_transformers']:.2f}x",
            f"{entry['ratio_to_products']:.2f}x",
            *([_number(entry.get(key), "{:,.0f}") for key in KEPT] if counted else _calls(entry)),
        )
    return table


def _calls(entry: dict[str, Any]) -> list[str]:
    if "operator_calls" not in entry:  # unfinished result: operators are counted after the times
        return ["", "", ""]
    counts = [f"{entry['operator_calls'][key]:,}" for key in ("operators", "without_optimizer")]
    return [*counts, f"{entry['calls_to_transformers']['operators']:.2f}x"]


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


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header in TEXTS else "right", no_wrap=True)
    return table


def _milliseconds(entry: dict[str, Any]) -> list[str]:
    return [f"{1e3 * entry[key]:.2f}" for key in ("median_s", "p20_s", "p80_s")]


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
