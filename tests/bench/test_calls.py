"""The number of operators that a step calls, compared with bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmtl.bench.calls import OperatorCalls, operator_calls
from fastmtl.bench.sizes import Shape, Size
from fastmtl.bench.step_ways import TRANSFORMERS, WAYS
from fastmtl.bench.workload import Workload


def test_operators_within_operators_and_within_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)
    rows = torch.ones(3, 2)
    with torch.no_grad():
        inner = operator_calls(lambda: torch.mm(rows, weight))
        assert operator_calls(lambda: torch.matmul(rows, weight)) == (inner.operators + 1, inner.operators + 1, 1)
    weight.grad = torch.ones(2, 2)
    assert operator_calls(optimizer.step)[1:] == (0, 0)

    def step() -> None:
        rows.neg()
        optimizer.step()

    found = operator_calls(step)
    assert found[1:] == (1, 1)
    assert found.operators > 1


def test_the_nodes_of_the_graph_are_no_operators() -> None:
    x = torch.ones(2, requires_grad=True)
    assert operator_calls(lambda: torch.autograd.grad(x.neg(), x, torch.ones(2)))[2] == 3  # neg, ones, neg again


@pytest.fixture(scope="module")
def calls() -> Callable[[str, int], OperatorCalls]:
    """Return (way, layers) -> the calls of the second step."""

    def count(name: str, layers: int) -> OperatorCalls:
        shape = Shape("tiny", 32, layers, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)
        way, work = WAYS[name], Workload(Size(shape, dropout=0.1))
        assert way.model is not None
        step = way.build(work, way.model(work).train())
        step()
        return operator_calls(step)

    return count


@pytest.mark.parametrize(
    ("name", "in_a_layer", "elsewhere"),
    [("fastmtl sum", (300, 125), (450, 160)), ("fastmtl pcgrad", (360, 140), (1200, 370))],
)
def test_calls_of_a_step(
    name: str, in_a_layer: tuple[int, int], elsewhere: tuple[int, int], calls: Callable[[str, int], OperatorCalls]
) -> None:
    """Three tasks: all operators and outermost ones, without the optimiser."""
    one, three = calls(name, 1)[1:], calls(name, 3)[1:]
    layer = [(more - less) / 2 for less, more in zip(one, three, strict=True)]
    rest = [less - each for less, each in zip(one, layer, strict=True)]
    assert all(found <= bound for found, bound in zip(layer, in_a_layer, strict=True)), layer
    assert all(found <= bound for found, bound in zip(rest, elsewhere, strict=True)), rest


def test_a_pcgrad_step_makes_at_most_two_fifths_of_transformers_calls(
    calls: Callable[[str, int], OperatorCalls],
) -> None:
    """Count MiniLM's six layers with and without the optimiser; widths do not matter."""
    ours, theirs = calls("fastmtl pcgrad", 6), calls(TRANSFORMERS, 6)
    assert ours.operators <= 0.4 * theirs.operators
    assert ours.without_optimizer <= 0.4 * theirs.without_optimizer
