"""A profile as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fastmtl.measure.parts import MEANING, PARTS

MIB = 2**20
SHORT = {"gradients": "grads", "optimiser": "optim", "task gradients": "J", "activations": "activ", "workspace": "work"}


def show(result: dict[str, Any], console: Console) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

    say(f"{result['recipe']}, {_settings(result)}", "bold")
    console.print(_memory(result))
    legend = "; ".join(f"{SHORT.get(part, part)}: {MEANING[part]}" for part in PARTS)
    say(f"MiB of tensors at the peak of a step. {legend}.\n")
    console.print(_speed(result))
    for point in result["points"]:
        if point["failed"]:
            say(f"{point['series']}, batch size {point['batch_size']}: {point['failed']}")
    for note in dict.fromkeys(note for p in result["points"] for note in (p["measured"] or {}).get("notes", ())):
        say(note)
    for spread in result.get("spread", ()):
        say(f"\n{spread['series']}, batch size {spread['batch_size']} a rank: predicted MiB of a rank", "bold")
        console.print(_spread(spread))
    for largest in result.get("largest", ()):
        say(_largest(largest))
    for point in result["points"]:
        trace = (point["measured"] or {}).get("trace")
        if trace is not None:
            say(f"\n{point['series']}, batch size {point['batch_size']}: where the time goes", "bold")
            console.print(_time(trace))
            say(f"for https://ui.perfetto.dev: {trace['file']}")
            if "memory_snapshot" in trace:
                say(f"for https://pytorch.org/memory_viz: {trace['memory_snapshot']}")
    about = result["environment"]
    say("")
    where = f"{about['threads']} threads" if about["driver"] is None else f"driver {about['driver']}"
    say(f"{about['device']}, {where}, torch {about['torch']}")
    if "advice" in result:
        say(result["advice"]["text"], style="bold")


def _memory(result: dict[str, Any]) -> Table:
    parts = [SHORT.get(part, part) for part in PARTS]
    table = _table("batch", "method", *parts, "peak", "predicted")
    for point in result["points"]:
        measured, predicted = point["measured"], point["predicted"]
        row = [str(point["batch_size"]), point["series"]]
        if measured is None:
            row += [*[""] * len(PARTS), "failed", _mib(predicted["bytes"])]
        else:
            row += [_mib(measured["parts"][part]) for part in PARTS]
            row += [_mib(measured["bytes"]), f"{_mib(predicted['bytes'])} ({100 * point['error']:+.1f} %)"]
        table.add_row(*row)
    return table


def _speed(result: dict[str, Any]) -> Table:
    """Return a table of speed; columns of a GPU appear only if it reports them."""
    extra = [
        (header, key, form)
        for header, key, form in (
            ("reserved MiB", "reserved_bytes", _mib),
            ("GPU busy", "utilisation", lambda value: f"{value:.0f} %"),
            ("J/step", "joules_per_step", lambda value: f"{value:.1f}"),
        )
        if any((point["measured"] or {}).get(key) is not None for point in result["points"])
    ]
    headers = ("batch", "method", "tokens", "ms/step", "tokens/s", "process MiB", *(header for header, _, _ in extra))
    table = _table(*headers)
    for point in result["points"]:
        measured = point["measured"]
        if measured is None:
            continue
        seconds = measured["seconds"]["median_s"]
        row = [str(point["batch_size"]), point["series"], str(measured["tokens"]), f"{1e3 * seconds:.0f}"]
        row += [f"{measured['tokens_per_s']:.0f}", _mib(measured.get("process_bytes"))]
        row += ["" if measured.get(key) is None else form(measured[key]) for _, key, form in extra]
        table.add_row(*row)
    return table


def _spread(spread: dict[str, Any]) -> Table:
    worlds = list(next(iter(spread["stages"].values()))["bytes"])
    table = _table("ZeRO", *(f"{world} ranks" if world != "1" else "1 rank" for world in worlds))
    for stage, entry in spread["stages"].items():
        other = entry["storage"] not in (spread["series"].partition(" ")[2], "none")
        name = f"{stage} ({entry['storage']})" if other else stage
        table.add_row(name, *(_mib(entry["bytes"][world]) for world in worlds))
    return table


def _time(trace: dict[str, Any]) -> Table:
    table = _table("part", "ms", "share")
    total = sum(trace["seconds"].values())
    for name, seconds in trace["seconds"].items():
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / total:.0%}")
    return table


def _largest(largest: dict[str, Any]) -> str:
    limit = f"{largest['limit'] / 2**30:.3g} GiB"
    if largest["failed"]:
        return f"{largest['series']}: the largest batch for {limit} was not found: {largest['failed']}"
    tried = ", ".join(f"{t['batch_size']} {'fits' if t['fits'] else 'does not'}" for t in largest["tried"])
    found = f"batch size {largest['measured']} fits in {limit}"
    return f"{largest['series']}: {found} (predicted {largest['predicted']}; {tried})"


def _settings(result: dict[str, Any]) -> str:
    engine = result["settings"]["engine"]
    texts = [f"{result['parameters'] / 1e6:.1f} M parameters", f"ZeRO {engine['zero']}", engine["precision"]]
    if engine["accumulation"] > 1:
        texts.append(f"{engine['accumulation']} micro-batches")
    recompute = result["settings"]["encoder"]["recompute"]
    if recompute != "none":
        texts.append(f"recompute {recompute}")
    return ", ".join(texts)


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header in ("method", "part", "ZeRO") else "right", no_wrap=True)
    return table


def _mib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / MIB:.0f}"
