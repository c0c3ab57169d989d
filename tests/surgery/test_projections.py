"""Several Linears of one input in one operation, compared with separate ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sinks import Mode, sink_of
from torch import Tensor, nn

from fastmtl.bench.calls import operators
from fastmtl.errors import UserError
from fastmtl.surgery import functional
from fastmtl.surgery.rules.projections import projections
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink

NUMBER, IN, OUT = 3, 6, 5
HOST = (0, 4, 4, 7)
PARTS = Segments(torch.tensor(HOST, dtype=torch.int32), HOST)
WEIGHTS = torch.tensor([2.0, 1.0, -1.0])


def parameters(*, beside: bool, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return three weights and their biases; beside: as views of two flat tensors."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NUMBER, OUT, IN, generator=generator).to(dtype)
    biases = torch.randn(NUMBER, OUT, generator=generator).to(dtype)
    return tuple(  # type: ignore[return-value]
        [nn.Parameter(part if beside else part.clone()) for part in parts.unbind()] for parts in (weights, biases)
    )


def one_by_one(
    x: Tensor, weights: list[nn.Parameter], biases: list[nn.Parameter], parts: Segments, sink: Sink | None
) -> Tensor:
    found = [functional.linear(x, *pair, parts, sink) for pair in zip(weights, biases, strict=True)]
    return torch.stack(found, dim=1)


def solve(index: int, gram: Tensor) -> Tensor:
    return WEIGHTS * (1 + gram.diagonal().sign())


def results(
    op: Callable[..., Tensor], mode: Mode | None, *, beside: bool, dtype: torch.dtype, frozen: bool, autocast: bool
) -> list[Tensor | None]:
    """Return Y, dX, the parameters' gradients, G and the merged gradient."""
    weights, biases = parameters(beside=beside, dtype=dtype)
    every = [*weights, *biases]
    in_j = every if beside else [parameter for pair in zip(weights, biases, strict=True) for parameter in pair]
    weights[1].requires_grad_(not frozen)
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    sink: Any = None
    if mode is not None:
        options: dict[str, Any] = {
            "stack": {"dtype": dtype},
            "weighted": {"weights": WEIGHTS},
            "tensor": {"solve": solve},
        }
        sink = sink_of(mode, [p for p in in_j if p.requires_grad], 3, **options.get(mode, {}))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = op(x, weights, biases, PARTS, sink)
        if sink is not None:
            sink.forward_done()
        (y.float().square() * torch.arange(1, 1 + y.numel()).view_as(y)).sum().backward()
        return y.detach()

    if sink is None or mode is None:
        found = [run()]
    else:
        with sink.armed(x.device, **({"accumulates": False} if mode == "gramian" else {})):
            found = [run()]
        if mode in ("stack", "gramian"):
            found.append(sink.gramian())
        if mode == "stack":
            merged = sink.combine(WEIGHTS)
            found += [merged[id(parameter)] for parameter in every if parameter.requires_grad]
    return [*found, x.grad, *(parameter.grad for parameter in every)]


@pytest.mark.parametrize("mode", [None, "stack", "gramian", "weighted", "tensor"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("dtype", "frozen", "autocast"),
    [
        (torch.float32, False, False),
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.float32, False, True),
    ],
)
def test_it_is_what_the_linears_are(
    mode: Mode | None, beside: bool, dtype: torch.dtype, frozen: bool, autocast: bool
) -> None:
    keywords: dict[str, Any] = {"beside": beside, "dtype": dtype, "frozen": frozen, "autocast": autocast}
    found, expected = (results(op, mode, **keywords) for op in (projections, one_by_one))
    assert len(found) == len(expected)
    rounding = 2**-7 if autocast or dtype == torch.bfloat16 else 2**-21
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert (one - other).float().norm() <= rounding * other.float().norm()


def test_all_of_them_are_one_product() -> None:
    """One product of the input; in backward, one for its gradient and one for the weights."""
    names = {}
    for beside in (True, False):
        x, (weights, biases) = torch.randn(7, IN, requires_grad=True), parameters(beside=beside)
        dy = torch.randn(7, NUMBER, OUT)

        def run(x: Tensor = x, of: tuple[list[Any], list[Any]] = (weights, biases), dy: Tensor = dy) -> None:
            projections(x, *of, PARTS).backward(dy)

        names[beside] = [event.name for event in operators(run)]
        assert names[beside].count("aten::addmm") == 1 and names[beside].count("aten::mm") == 2
        assert not {"aten::stack", "aten::add", "aten::clone"} & set(names[beside])
    assert "aten::cat" not in names[True]
    assert names[False].count("aten::cat") == 3  # weights and biases in forward, weights in backward


def test_task_gradients_are_one_product_where_their_columns_are_side_by_side() -> None:
    """One of the weights may have a gradient already while the others have none."""
    weights, biases = parameters(beside=False)
    x, calls = torch.randn(7, IN, requires_grad=True), {}
    found: list[list[Tensor]] = []
    for order in ([*weights, *biases], [p for pair in zip(weights, biases, strict=True) for p in pair]):
        sink = StackSink(order, 3)
        with sink.armed(x.device):
            sink.stack_of(weights[1]).add_task(weights[1], 0, torch.ones(OUT, IN))
            for _ in range(2):
                y = projections(x, weights, biases, PARTS, sink)
                events = operators(lambda y=y: torch.autograd.grad(y.sum(), [x]))
            calls[len(found)] = [event.name for event in events].count("aten::addmm_")
        merged = sink.combine(WEIGHTS)
        found.append([merged[id(parameter)] for parameter in (*weights, *biases)])
    assert calls == {0: 2, 1: 2 * NUMBER}  # of the two tasks that have rows
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_row_beyond_the_segments_is_of_no_task() -> None:
    weights, biases = parameters(beside=False)
    x, sink = torch.randn(9, IN), sink_of("weighted", [*weights, *biases], 3, weights=WEIGHTS)
    for op in (projections, one_by_one):
        found = []
        for rows in (x, x[:7]):
            with sink.armed(x.device):
                found.append(torch.autograd.grad(op(rows, weights, biases, PARTS, sink).sum(), [*weights, *biases]))
        for whole, without in zip(*found, strict=True):
            assert torch.equal(whole, without)


def test_an_input_that_does_not_fit_is_refused() -> None:
    weights, biases = parameters(beside=False)
    sink = StackSink([*weights, *biases], 3)
    with sink.armed(torch.device("cpu")), pytest.raises(UserError, match="the segments end at row 7"):
        projections(torch.randn(6, IN), weights, biases, PARTS, sink)
