"""A comparison of two results of one benchmark: what became slower or faster, and the noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastmtl.errors import UserError

# Two results must agree in these, otherwise their times say nothing about the code.
MACHINE = ("device", "threads")
SETTINGS = ("benchmark", "shape", "precision", "tasks", "tokens", "dropout", "sweep")


class Change(NamedTuple):
    """The change of one time.

    ratio: the new median over the old one. noise: the sum of both spreads, from the 20 % to the 80
    % quantile, relative to the medians. verdict: "slower" or "faster" if the two ranges do not
    overlap, else "".
    """

    name: str
    old_s: float
    new_s: float
    ratio: float
    noise: float
    verdict: str


def read(path: Path) -> dict[str, Any]:
    """Return a result that `--json` wrote. Raise UserError if the file is not one."""
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
    """Raise UserError if machine or settings differ."""
    for where, keys in ((lambda r: r["environment"], MACHINE), (lambda r: r, SETTINGS)):
        for key in keys:
            before, now = where(old).get(key), where(new).get(key)
            if before != now:
                raise UserError(
                    f"--compare: the old result has {key} {_name(before)}, this one {_name(now)}: "
                    "their times cannot be compared"
                )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return the changes of all times that both results have, the largest slowdown first.

    Raises UserError like check_same.
    """
    check_same(old, new)
    before = dict(times(old))
    found = []
    for name, entry in times(new):
        if name in before:
            found.append(_change(name, before[name], entry))
    return sorted(found, key=lambda change: -change.ratio)


def times(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every summary of samples in a result, named by the keys that lead to it."""
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
