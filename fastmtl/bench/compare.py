"""Comparison of two results of one benchmark: what became slower or faster, and the noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastmtl.errors import UserError

# Two results must agree in these fields. Otherwise a change of times may not come from the code.
MACHINE = ("device", "threads")
SETTINGS = ("benchmark", "shape", "precision", "tasks", "tokens", "dropout", "sweep")


class Change(NamedTuple):
    """The old and the new time of one measured step or operation.

    name: made of the keys that lead to the time in the result. old_s, new_s: medians in seconds.
    ratio: new_s / old_s. noise: the sum of both spreads; a spread is the difference between the 80
    % and the 20 % quantile, divided by the median. verdict: "slower" or "faster" if the intervals
    between these quantiles do not overlap, else "".
    """

    name: str
    old_s: float
    new_s: float
    ratio: float
    noise: float
    verdict: str


def read(path: Path) -> dict[str, Any]:
    """Return a result that `fastmtl bench ... --json` wrote. Raise UserError for any other file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: give a file that `fastmtl bench ... --json` wrote") from None
    if not isinstance(result, dict) or "benchmark" not in result or not isinstance(result.get("environment"), dict):
        raise UserError(f"{path} is not the result of a benchmark: give a file that `fastmtl bench ... --json` wrote")
    return result


def check_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError if the two results come from different machines or settings."""
    for where, keys in ((lambda r: r["environment"], MACHINE), (lambda r: r, SETTINGS)):
        for key in keys:
            before, now = where(old).get(key), where(new).get(key)
            if before != now:
                raise UserError(
                    f"--compare: the old result has {key} {_name(before)}, this one {_name(now)}: "
                    "their times cannot be compared"
                )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return a Change for every time that both results have, the largest slowdown first.

    Raises UserError if the two results come from different machines or settings.
    """
    check_same(old, new)
    before = dict(times(old))
    found = []
    for name, entry in times(new):
        if name in before:
            found.append(_change(name, before[name], entry))
    return sorted(found, key=lambda change: -change.ratio)


def times(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, summary) for each measured time; a name is made of the keys that lead to it."""
    for key in ("operations", "variants", "steps", "points", "peers", "ways"):
        yield from _times("", result.get(key, {}))


def _times(name: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, list):
        value = {f"{point.get('name', point.get('tasks'))}": point for point in value}
    if not isinstance(value, dict):
        return
    if "median_s" in value:
        yield name, value
        return
    for key, inner in value.items():
        yield from _times(name if key in ("passes", "steps") else f"{name}, {key}".removeprefix(", "), inner)


def _change(name: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    ratio = new["median_s"] / old["median_s"]
    noise = sum((entry["p80_s"] - entry["p20_s"]) / entry["median_s"] for entry in (old, new))
    slower, faster = new["p20_s"] > old["p80_s"], new["p80_s"] < old["p20_s"]
    return Change(name, old["median_s"], new["median_s"], ratio, noise, "slower" * slower + "faster" * faster)


def _name(value: Any) -> Any:
    return value["name"] if isinstance(value, dict) and "name" in value else value
