"""Bisection, and advice from its result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastmtl.config import parse_recipe
from fastmtl.profile import advice
from fastmtl.profile.find_max import LARGEST, PARTS, bisect


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 16, 100, 193, 1000, 12345])
@pytest.mark.parametrize("start", [1, 5, 100, 4000])
def test_bisection_finds_the_largest_that_fits(largest: int, start: int) -> None:
    asked = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= largest

    found = bisect(fits, start)
    assert found <= largest < found + max(1, found // PARTS) + 1
    assert found in asked and min(asked) >= 1
    assert len(set(asked)) == len(asked) or largest == 1


def test_a_good_start_needs_few_trials() -> None:
    asked = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= 200

    assert bisect(fits, 190) >= 188
    assert len(asked) <= 5


def test_bisection_ends_where_nothing_fits_and_where_everything_does() -> None:
    assert bisect(lambda size: False, 40) == 0
    assert bisect(lambda size: True, LARGEST // 2) >= LARGEST


def point(series: str, error: float | None, beside: int = 0) -> dict:
    measured = None if error is None else {"bytes": 100, "process_bytes": 100 + beside}
    found = {"series": series, "batch_size": 8, "measured": measured}
    return found if error is None else {**found, "error": error}


def test_what_a_process_holds_beside_and_how_far_the_model_falls_short() -> None:
    points = [point("sum", 0.03, 40), point("pcgrad stacked", -0.2, 50), point("gradvac", None)]
    assert advice.overhead_bytes(points) == 50
    assert advice.underestimate(points) == pytest.approx(1.25)
    assert advice.overhead_bytes([point("sum", None)]) == 0
    assert advice.underestimate([point("sum", 0.5)]) == 1


def test_the_sentence() -> None:
    fits = {
        "pcgrad stacked": {"batch_size": 192, "measured": False},
        "pcgrad replay": {"batch_size": 256, "measured": False},
    }
    text = advice.sentence(fits, 24 * 2**30, 4, 0.021)
    assert text == (
        "PCGrad with `storage: replay` fits batch size 256 in 24 GiB; PCGrad with `storage: stacked` 192 "
        "(predicted; the model was within 2.1 % of 4 measured points)."
    )
    measured = {name: {**entry, "measured": True} for name, entry in fits.items()}
    assert advice.sentence(measured, 24 * 2**30, 4, 0.021).endswith(" 192 (measured).")
    nothing = {"sum": {"batch_size": 0, "measured": True}}
    assert advice.sentence(nothing, 2**29, 0, None) == "the sum of the losses fits no batch in 0.5 GiB (measured)."


@pytest.mark.parametrize(
    ("engine", "nbytes", "expected"),
    [
        ({}, 100, "is `stacked`"),
        ({}, 60, "is `kept`"),
        ({}, 45, "is `replay`"),
        ({"zero": 3}, 100, "is `replay`"),
        ({}, 10, "no storage fits"),
    ],
)
def test_the_fastest_storage_that_fits(engine: dict, nbytes: int, expected: str) -> None:
    recipe = parse_recipe({"tasks": {"a": {"type": "binary", "data": {}}}, "engine": engine}, "test")
    bytes_of = {"stacked": 70, "kept": 50, "replay": 40}
    plan = SimpleNamespace(
        phase=SimpleNamespace(recipe=recipe),
        predict=lambda point: SimpleNamespace(nbytes=bytes_of[point.storage] * point.batch_size // 8),
    )
    points = [{"method": "sum", "storage": "none", "batch_size": 16}]
    points += [{"method": "pcgrad", "storage": "stacked", "batch_size": size} for size in (8, 4)]
    (text,) = advice.storages(plan, points, 2**30, nbytes)  # type: ignore[arg-type]
    assert text.startswith("At batch size 8 ") and text.endswith(".") and expected in text
