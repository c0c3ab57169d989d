"""Advice from a profile: the largest batch size of each series, and the storage to choose.

A series is a method with a storage of task gradients. If a series' largest batch was measured, that
size counts. Else the memory model predicts it, corrected by the measured points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmtl.profile.find_max import LARGEST, largest_predicted
from fastmtl.profile.plan import STORAGES, Plan, Point

GIB = 2**30
NAMES = {"sum": "the sum of the losses", "pcgrad": "PCGrad", "gradvac": "GradVac"}


def overhead_bytes(points: Sequence[dict[str, Any]]) -> int:
    """Return the bytes that a process holds beyond its tensors: libraries, a CUDA context, holes.

    This is the maximum over the measured points; 0 if it is unknown.
    """
    measured = [point["measured"] for point in points if point["measured"] is not None]
    held = [m["process_bytes"] - m["bytes"] for m in measured if m.get("process_bytes") is not None]
    return max([0, *held])


def underestimate(points: Sequence[dict[str, Any]]) -> float:
    """Return the largest ratio of a measured to a predicted peak, at least 1."""
    return max([1.0, *(1 / (1 + point["error"]) for point in points if "error" in point)])


def advice(plan: Plan, result: dict[str, Any]) -> dict[str, Any]:
    """Return the advice, JSON-ready.

    text: for the user. fits: for each series the largest batch size that fits, and whether it was
    measured. beside_bytes: overhead_bytes of the points. factor: the underestimate of the points.
    """
    points, limit = result["points"], result["memory_limit"]
    overhead, factor = overhead_bytes(points), underestimate(points)
    searched = {entry["series"]: entry["measured"] for entry in result.get("largest", [])}
    fits: dict[str, dict[str, Any]] = {}
    for entry in points:
        if entry["series"] in fits:
            continue
        point = Point(entry["batch_size"], entry["method"], entry["storage"])
        measured = searched.get(point.series)
        size = largest_predicted(plan, point, (limit - overhead) / factor) if measured is None else measured
        fits[point.series] = {"batch_size": size, "measured": measured is not None}
    checked = sum("error" in point for point in points)
    text = sentence(fits, limit, checked, max((abs(p["error"]) for p in points if "error" in p), default=None))
    text = " ".join([text, *storages(plan, points, limit, (limit - overhead) / factor)])
    return {"text": text, "fits": fits, "beside_bytes": overhead, "factor": factor}


def storages(plan: Plan, points: Sequence[dict[str, Any]], limit: int, nbytes: float) -> list[str]:
    """Return a sentence for each method with task gradients: the fastest storage that fits.

    The sentence is for the method's largest batch size. Storages are predicted, so they need not be
    measured. limit: the memory that the sentence names. nbytes: a storage fits if its predicted
    peak is at most this.
    """
    engine, largest = plan.phase.recipe.engine, dict[str, int]()
    for point in points:
        if point["storage"] != "none":
            largest[point["method"]] = max(point["batch_size"], largest.get(point["method"], 0))
    found = []
    for method, size in largest.items():
        candidates = STORAGES[-1:] if engine.zero == 3 or engine.offload else STORAGES
        fits = [one for one in candidates if plan.predict(Point(size, method, one)).nbytes <= nbytes]
        claim = f"the fastest storage of {NAMES.get(method, method)} that fits" if fits else "no storage fits"
        best = f" is `{fits[0]}`" if fits else ""
        found.append(f"At batch size {size} {claim} in {limit / GIB:.3g} GiB{best}.")
    return found


def sentence(fits: dict[str, dict[str, Any]], limit: int, checked: int, error: float | None) -> str:
    ordered = sorted(fits.items(), key=lambda item: -item[1]["batch_size"])
    (series, first), *others = ordered
    size = f"{limit / GIB:.3g} GiB"
    text = f"{_name(series)} fits {_size(first['batch_size'])} in {size}"
    if others:
        text += "; " + ", ".join(f"{_name(name)} {_batch(entry['batch_size'])}" for name, entry in others)
    if all(entry["measured"] for entry in fits.values()):
        return f"{text} (measured)."
    if error is None:
        return f"{text} (predicted; no point was measured)."
    return f"{text} (predicted; the model was within {100 * error:.1f} % of {checked} measured points)."


def _name(series: str) -> str:
    method, _, storage = series.partition(" ")
    name = NAMES.get(method, method)
    return f"{name} with `storage: {storage}`" if storage else name


def _size(batch_size: int) -> str:
    return "no batch" if batch_size == 0 else f"batch size {_batch(batch_size)}"


def _batch(batch_size: int) -> str:
    return {0: "none", LARGEST: f"{LARGEST} and more"}.get(batch_size, f"{batch_size}")
