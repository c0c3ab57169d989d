"""Search for the largest batch that fits, by bisection; each try is a separate process.

A process may run out of memory without harm to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastmtl.measure.harness import Say
from fastmtl.profile import process
from fastmtl.profile.measure import Job, measure
from fastmtl.profile.plan import Plan, Point

# The search stops when it is accurate to 1 / PARTS of the batch size.
PARTS = 16
GROWTH = 1.25
LARGEST = 1 << 17


def find_max(recipe: dict[str, Any], plan: Plan, point: Point, limit: int, say: Say, overhead: int) -> dict[str, Any]:
    """Find the largest batch size whose process stays within `limit` bytes.

    point: its method and storage are used. overhead: bytes that a process holds beyond its tensors.
    The memory model predicts the first size to try; real processes decide. Returns the result,
    JSON-ready. measured: the size found, 0 if none fits, None if a process failed for another
    reason than memory. tried: every size that was tried.
    """
    tried: dict[int, dict[str, Any]] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            say(f"does batch size {size} fit? {point.series}")
            outcome = process.run(
                measure, Job(recipe, plan.phase.name, replace(point, batch_size=size), limit, timed=0)
            )
            if outcome.result is None and not outcome.out_of_memory:
                raise CannotMeasure(outcome.failed)
            held = None if outcome.result is None else outcome.result.get("process_bytes") or outcome.result["bytes"]
            tried[size] = {"fits": held is not None and held <= limit, "process_bytes": held}
        return bool(tried[size]["fits"])

    predicted = largest_predicted(plan, point, limit - overhead)
    found: dict[str, Any] = {"series": point.series, "limit": limit, "predicted": predicted, "failed": None}
    try:
        found["measured"] = bisect(fits, max(predicted, 1))
    except CannotMeasure as error:
        found |= {"measured": None, "failed": str(error)}
    return {**found, "tried": [{"batch_size": size, **entry} for size, entry in tried.items()]}


class CannotMeasure(Exception):
    """Raised for a point that failed for another reason than memory."""


def bisect(fits: Callable[[int], bool], start: int) -> int:
    """Return the largest number that fits, accurate to 1 / PARTS of it; 0 if none fits.

    start: the first number to try.
    """
    low, high = 0, None
    size = start
    while high is None or low == 0:
        if fits(size):
            low = size
            if high is not None or size >= LARGEST:
                break
            size = max(size + 1, int(size * GROWTH))
        else:
            high = size
            if low or size == 1:
                break
            size = max(1, int(size / GROWTH) if size > 1 else 1)
    while high is not None and low and high - low > max(1, low // PARTS):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_predicted(plan: Plan, point: Point, nbytes: float) -> int:
    """Return the largest batch size whose predicted peak is at most `nbytes`; 0 if none is."""

    def fits(size: int) -> bool:
        return plan.predict(replace(point, batch_size=size)).nbytes <= nbytes

    if not fits(1):
        return 0
    low = 1
    while low < LARGEST and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // (8 * PARTS)):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
