"""The time at which J's columns may be sent; other ranks are faked (real: test_deepspeed.py)."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastmtl.surgery.ranks import collectives
from fastmtl.surgery.ranks.together import Together
from fastmtl.surgery.sinks import early_scatter
from fastmtl.surgery.sinks.stack import StackSink

TASKS, SIZE, NUMBER = 2, 6, 5


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[StackSink]:
    """Return a sink for five parameters, a piece of J each, after a first step in reverse order."""
    monkeypatch.setattr(collectives, "BUCKET", TASKS * SIZE)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
        parameters = [nn.Parameter(torch.zeros(SIZE)) for _ in range(NUMBER)]
        sink = StackSink(parameters, TASKS, ranks=Together())
        step(sink, parameters, parameters[::-1])
        yield sink
    finally:  # a group that is left behind fails the tests that follow
        dist.destroy_process_group()


def step(sink: StackSink, used: list[nn.Parameter], written: list[nn.Parameter], *, last: bool = True) -> None:
    sink.clear()
    with sink.armed(torch.device("cpu")):
        sink.expect(*used)
        sink.forward_done(last=last)
        for parameter in written:
            sink.deliver(parameter, torch.ones(TASKS, SIZE))
    sink.gramian()


def sent_early(sink: StackSink) -> int:
    assert sink.early is not None
    return sink.early.sent_early


def test_nothing_goes_before_the_order_is_known(sink: StackSink) -> None:
    assert sent_early(sink) == 0


@pytest.mark.parametrize(
    ("used", "written", "sent"),
    [
        ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], 5),
        ([0, 1, 2, 3, 4], [4, 3], 2),  # the loss does not depend on the others
        ([0, 1, 2, 3, 4], [4, 3, 1, 0], 2),  # parameters after an incomplete one wait
        ([0, 1, 2, 4], [4, 2, 1, 0], 1),  # a parameter that no forward used may be written elsewhere
        ([0, 1, 2, 3, 4, 4], [4, 3, 2, 1, 0], 0),  # used twice, written once
        ([0, 1, 2, 3, 4, 4], [4, 3, 4, 2, 1, 0], 5),
    ],
)
def test_a_piece_goes_when_it_is_complete_and_its_turn(
    sink: StackSink, used: list[int], written: list[int], sent: int
) -> None:
    parameters = sink.dense
    step(sink, [parameters[k] for k in used], [parameters[k] for k in written])
    assert sent_early(sink) == sent


def test_micro_batches_before_the_last_send_nothing(sink: StackSink) -> None:
    step(sink, sink.dense, sink.dense[::-1], last=False)
    assert sent_early(sink) == 0


def test_the_order_is_that_of_the_first_step_which_may_send(sink: StackSink) -> None:
    """A step that is compared with T passes sends nothing early, and no order is known after it."""
    other, parameters = StackSink(sink.dense, TASKS, ranks=Together()), sink.dense
    for last, sent in ((False, 0), (True, 0), (True, NUMBER), (False, 0), (True, NUMBER)):
        step(other, parameters, parameters[1:] + parameters[:1], last=last)
        assert sent_early(other) == sent


def test_no_more_than_two_are_on_their_way(sink: StackSink, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most = 0, 0
    start, share = early_scatter.start_scatter, collectives.Scattering.share

    def started(piece: Tensor) -> collectives.Scattering:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        return start(piece)

    def shared(self: collectives.Scattering) -> Tensor:
        nonlocal under_way
        under_way -= self._work is not None
        return share(self)

    monkeypatch.setattr(early_scatter, "start_scatter", started)
    monkeypatch.setattr(collectives.Scattering, "share", shared)
    step(sink, sink.dense, sink.dense[::-1])
    assert (sent_early(sink), most, under_way) == (NUMBER, early_scatter.IN_FLIGHT, 0)


def test_a_write_that_comes_too_late_is_an_error(sink: StackSink) -> None:
    *others, last = sink.dense
    with pytest.raises(RuntimeError, match="before its last use had written"):
        step(sink, [*others, last], [last, last])
    step(sink, sink.dense, sink.dense[::-1])  # its unfinished collectives are dropped
    assert sent_early(sink) == NUMBER


def test_what_goes_is_the_sum_over_uses(sink: StackSink) -> None:
    """The other ranks send nothing back, so a share is this rank's own half of the columns."""
    *others, last = sink.dense
    step(sink, [*others, last, last], [last, last, *others[::-1]])
    sink.clear()
    with sink.armed(torch.device("cpu")):
        sink.expect(*others, last, last)
        sink.forward_done(last=True)
        for parameter in (last, last, *others[::-1]):
            sink.deliver(parameter, torch.ones(TASKS, SIZE))
    half = SIZE // 2
    torch.testing.assert_close(sink.gramian(), torch.full((TASKS, TASKS), float(half * (NUMBER - 1) + half * 4)))


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("columns", [6, 7])
def test_what_is_sent_is_a_copy(tasks: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(buffer: Tensor, **_: bool) -> mock.Mock:
        buffer += 1  # the other rank's values
        return mock.Mock()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    piece = torch.zeros(tasks, columns)
    assert collectives.start_scatter(piece).share().tolist() == [[1.0] * -(-columns // 2)] * tasks
    assert not piece.any()
