"""Named ranges of a step, as a profiler and a listener see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastmtl.measure import ranges
from fastmtl.surgery import GradientSurgery


def told() -> tuple[list[str], ranges.Listener]:
    heard: list[str] = []
    return heard, lambda name, begins: heard.append(("+" if begins else "-") + name)


def test_a_listener_hears_ranges_as_they_nest() -> None:
    heard, listener = told()
    with ranges.profile_range("data"):
        pass
    with ranges.listening(listener), ranges.profile_range("surgery"), ranges.profile_range("communication"):
        pass
    with ranges.profile_range("data"):
        pass
    assert heard == ["+surgery", "+communication", "-communication", "-surgery"]


def test_a_range_ends_with_an_error() -> None:
    heard, listener = told()
    with pytest.raises(KeyError), ranges.listening(listener), ranges.profile_range("forward"):
        raise KeyError
    assert heard == ["+forward", "-forward"]
    assert not ranges._listeners


def test_each_is_only_the_making_of_items() -> None:
    heard, listener = told()
    with ranges.listening(listener):
        for item in ranges.profile_iter("data", range(2)):
            heard.append(f"{item}")
    assert heard == ["+data", "-data", "0", "+data", "-data", "1", "+data", "-data"]


@pytest.mark.parametrize(
    ("method", "storage", "expected"),
    [
        ("sum", "auto", ["forward", "backward"]),
        ("pcgrad", "stacked", ["forward", "backward", "surgery", "communication"]),
    ],
)
def test_a_profiler_sees_the_parts_of_a_step(method: str, storage: Any, expected: list[str]) -> None:
    model = nn.Linear(3, 2)
    surgery = GradientSurgery(torch.optim.SGD(model.parameters()), method, tasks=["a", "b"], storage=storage)

    def loss_fn(x: torch.Tensor) -> dict[str, tuple[torch.Tensor, int]]:
        first, second = model(x).sum(0)
        return {"a": (first, 4), "b": (second, 4)}

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        surgery.run([torch.ones(4, 3)], loss_fn)
    found = [event for event in profiler.events() if event.name.startswith(ranges.PREFIX)]
    found.sort(key=lambda event: event.time_range.start)
    assert [event.name.removeprefix(ranges.PREFIX) for event in found] == expected
