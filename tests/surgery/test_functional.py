"""Every task's gradient from one backward, compared with one float64 backward per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinks import Mode, sink_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl.bench.waits import host_waits
from fastmtl.errors import UserError
from fastmtl.surgery import functional
from fastmtl.surgery.jacobian.compact_rows import Rows
from fastmtl.surgery.ranks.alone import Alone
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink

SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any)


class Net(nn.Module):
    """Embedding -> Linear -> LayerNorm -> Linear without bias, one loss per row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Parameter(torch.randn(11, 6, dtype=dtype))
        self.places = nn.Parameter(torch.randn(3, 6, dtype=dtype))
        self.weight = nn.Parameter(torch.randn(5, 6, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(5, dtype=dtype))
        self.gain = nn.Parameter(torch.rand(5, dtype=dtype))
        self.shift = nn.Parameter(torch.randn(5, dtype=dtype))
        self.last = nn.Parameter(torch.randn(4, 5, dtype=dtype))

    def forward(self, ids: Tensor, segments: Segments, sink: Sink | None) -> Tensor:
        x = functional.embedding(ids, self.words, segments, sink)
        x = x + functional.embedding(ids % 3, self.places, segments, sink)
        x = functional.linear(x, self.weight, self.bias, segments, sink)
        x = functional.layer_norm(x, self.gain, self.shift, 1e-5, segments, sink)
        return functional.linear(x.tanh(), self.last, None, segments, sink).square().sum(1)


def segments(sizes: list[int]) -> Segments:
    host = tuple([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return Segments(torch.tensor(host, dtype=torch.int32), host)


def rows(sizes: list[int]) -> Tensor:
    return torch.randint(0, 11, (sum(sizes),), generator=torch.Generator().manual_seed(1))


def expected_jacobian(net: Net, ids: Tensor, sizes: list[int]) -> Tensor:
    """Return [T, P] float64 by plain autograd, one backward per task."""
    wide = Net(torch.float64)
    wide.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    result = []
    for t in range(len(sizes)):
        loss = wide(ids, segments(sizes), None).split(sizes)[t].sum() + 0 * sum(p.sum() for p in wide.parameters())
        gradients = torch.autograd.grad(loss, list(wide.parameters()))
        result.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(result)


def scale(jacobian: Tensor) -> Tensor:
    norms = jacobian.norm(dim=1)
    return norms[:, None] * norms[None, :] + 1e-12


@pytest.mark.parametrize("mode", ["stack", "gramian", "tensor"])
def test_nothing_waits_for_the_device(mode: Mode) -> None:
    """Backward and merging, with an absent task, a compact and a dense table."""
    sizes = [4, 0, 3]
    net, ids, weights = Net(), rows(sizes), torch.tensor([1.0, 2.0, 3.0])
    solve: Any = {"solve": lambda index, gram: weights} if mode == "tensor" else {}
    sink = sink_of(mode, list(net.parameters()), len(sizes), sparse=[net.words], **solve)
    at_once = {"accumulates": False} if mode == "gramian" else {}
    with sink.armed(ids.device, **at_once):
        loss = net(ids, segments(sizes), sink).sum()
        sink.forward_done()

        def merge() -> None:
            torch.autograd.grad(loss, [sink.anchor, *net.parameters()], allow_unused=True)
            if mode != "tensor":
                sink.gramian()
            if mode == "stack":
                sink.combine(weights)
                sink.unmerged(weights)

        assert host_waits(merge) == []


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_stacked_gradients_and_gramian(sizes: list[int]) -> None:
    net, ids = Net(), rows(sizes)
    sink = StackSink(list(net.parameters()), len(sizes), sparse=[net.words])
    with sink.armed(ids.device):
        torch.autograd.grad(net(ids, segments(sizes), sink).sum(), [sink.anchor])
    expected = expected_jacobian(net, ids, sizes)
    gram = (sink.gramian()).double()
    assert ((gram - expected @ expected.T).abs() <= 1e-5 * scale(expected)).all()
    for t in range(len(sizes)):
        merged = sink.combine(torch.eye(len(sizes))[t])
        found = torch.cat([merged[id(p)].flatten() for p in net.parameters()])
        torch.testing.assert_close(found.double(), expected[t], atol=1e-5 * float(expected[t].norm() + 1e-12), rtol=0)
    assert all(parameter.grad is None for parameter in net.parameters())


@given(SIZES, st.booleans())
@settings(max_examples=30, deadline=None)
def test_gramian_without_keeping_the_gradients(sizes: list[int], keep: bool) -> None:
    net, ids = Net(), rows(sizes)
    sink = sink_of("gramian", list(net.parameters()), len(sizes), sparse=[net.words])
    with sink.armed(ids.device, accumulates=keep):
        loss = net(ids, segments(sizes), sink).sum()
        sink.forward_done()
        torch.autograd.grad(loss, [sink.anchor])
    expected = expected_jacobian(net, ids, sizes)
    gram = (sink.gramian()).double()
    assert ((gram - expected @ expected.T).abs() <= 1e-5 * scale(expected)).all()


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_weighted_gradients(sizes: list[int]) -> None:
    net, ids = Net(), rows(sizes)
    weights = torch.linspace(-1, 2, len(sizes))
    sink = sink_of("weighted", list(net.parameters()), len(sizes), sparse=[net.words], weights=weights)
    with sink.armed(ids.device):
        net(ids, segments(sizes), sink).sum().backward()
    expected = expected_jacobian(net, ids, sizes)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    bound = 1e-5 * float((weights.abs() * expected.norm(dim=1)).sum() + 1e-12)
    torch.testing.assert_close(found.double(), weights.double() @ expected, atol=bound, rtol=0)


def test_thousands_of_rows_add_up_in_sixteen_bits() -> None:
    """One of two token types has thousands of rows; a bfloat16 sum of ones would stop at 256."""
    table, ids = nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16)), torch.tensor([0] * 3000 + [1] * 1096)
    sink = sink_of("weighted", [table], 2, weights=torch.tensor([1.0, 0.5]))
    with sink.armed(ids.device):
        functional.embedding(ids, table, segments([2000, 2096]), sink).sum().backward()
    assert table.grad is not None and table.grad.dtype == torch.bfloat16
    assert table.grad[:, 0].tolist() == torch.tensor([2500, 548]).bfloat16().tolist()


def test_inputs_gradient_is_never_weighted() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    sink = sink_of("weighted", [weight, bias], 2, weights=torch.tensor([0.0, 5.0]))
    with sink.armed(x.device):
        functional.linear(x, weight, bias, segments([3, 3]), sink).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(6, 4))
    assert bias.grad is not None and bias.grad.tolist() == [15.0] * 3


@pytest.mark.parametrize("sink", [None, "unarmed"])
def test_without_an_armed_sink_it_is_plain_torch(sink: str | None) -> None:
    net, ids = Net(), rows([4, 3])
    held = None if sink is None else StackSink(list(net.parameters()), 2, sparse=[net.words])
    net(ids, segments([4, 3]), held).sum().backward()
    expected = expected_jacobian(net, ids, [4, 3]).sum(0)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    if held is not None:
        assert held.nbytes() == 0


def test_writes_add_up() -> None:
    net, ids = Net(), rows([4, 3])
    expected = expected_jacobian(net, ids, [4, 3]) * 2
    for mode in ("stack", "gramian"):
        sink = sink_of(mode, list(net.parameters()), 2, sparse=[net.words])
        for _ in range(2):
            with sink.armed(ids.device):
                torch.autograd.grad(net(ids, segments([4, 3]), sink).sum(), [sink.anchor])
        gram = (sink.gramian()).double()
        assert ((gram - expected @ expected.T).abs() <= 1e-5 * scale(expected)).all()
        sink.clear()
        assert (sink.gramian() == 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_weight_used_twice_adds_up_before_it_meets_the_gramian(keep: bool, checkpointing: bool) -> None:
    sizes, x = [3, 2], torch.randn(5, 4, requires_grad=True)
    weight, bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(sink: Sink | None) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            return functional.linear(x, weight, bias, segments(sizes), sink).tanh()

        hidden = x
        for _ in range(2):
            hidden = checkpoint(layer, hidden, use_reentrant=False) if checkpointing else layer(hidden)
        return hidden.square().sum(1)

    sink = sink_of("gramian", [weight, bias], 2)
    with sink.armed(x.device, accumulates=keep):
        loss = forward(sink).sum()
        sink.forward_done()
        torch.autograd.grad(loss, [x])
    jacobian = []
    for part in forward(None).split(sizes):
        gradients = torch.autograd.grad(part.sum(), [weight, bias], retain_graph=True)
        jacobian.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    expected = torch.stack(jacobian)
    assert ((sink.gramian().double() - expected @ expected.T).abs() <= 1e-5 * scale(expected)).all()


@pytest.mark.parametrize("mode", ["stack", "gramian", "weighted"])
def test_a_parameter_that_is_not_shared_keeps_its_own_gradient(mode: Mode) -> None:
    net, ids = Net(), rows([4, 3])
    own = [net.places, net.last, net.gain, net.shift]
    shared = [net.words, net.weight, net.bias]
    sink = sink_of(mode, shared, 2, sparse=[net.words], weights=torch.tensor([0.0, 3.0]))
    with sink.armed(ids.device):
        found = torch.autograd.grad(net(ids, segments([4, 3]), sink).sum(), [sink.anchor, *own])[1:]
    expected = torch.autograd.grad(net(ids, segments([4, 3]), None).sum(), own)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.norm()))


def test_bfloat16_is_as_exact_as_torch() -> None:
    """Every parameter's task gradients have at most the error of plain bfloat16 autograd."""
    sizes = [40, 0, 25]
    net, ids = Net(torch.bfloat16), rows(sizes)
    sink = StackSink(list(net.parameters()), 3, sparse=[net.words])
    with sink.armed(ids.device):
        torch.autograd.grad(net(ids, segments(sizes), sink).sum(), [sink.anchor])
    expected = expected_jacobian(net, ids, sizes)
    for t in (0, 2):
        plain = torch.autograd.grad(net(ids, segments(sizes), None).split(sizes)[t].sum(), list(net.parameters()))
        merged = sink.combine(torch.eye(3)[t])
        exact = expected[t].split([p.numel() for p in net.parameters()])
        for parameter, theirs, truth in zip(net.parameters(), plain, exact, strict=True):
            ours = (merged[id(parameter)].flatten() - truth).norm()
            assert ours <= 2 * (theirs.flatten().double() - truth).norm() + 2**-9 * truth.norm()


def test_autocast() -> None:
    net, ids = Net(), rows([4, 3])
    sink = StackSink(list(net.parameters()), 2, sparse=[net.words])
    with sink.armed(ids.device):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(ids, segments([4, 3]), sink).sum()
        torch.autograd.grad(loss, [sink.anchor])
    expected = expected_jacobian(net, ids, [4, 3])
    gram = (sink.gramian()).double()
    error = (gram - expected @ expected.T).abs() / scale(expected)
    assert 1e-5 < error.max() < 0.1


def test_a_sink_armed_in_forward_only_is_an_error() -> None:
    net, ids = Net(), rows([4, 3])
    sink = StackSink(list(net.parameters()), 2)
    with sink.armed(ids.device):
        loss = net(ids, segments([4, 3]), sink).sum()
    with pytest.raises(RuntimeError, match="armed in forward but not in backward"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_gradients_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    net, ids, weights = Net(torch.bfloat16), rows([4, 3]), torch.tensor([0.3, 1.7])
    sink = StackSink(list(net.parameters()), 2, sparse=[net.words], dtype=dtype)
    with sink.armed(ids.device):
        torch.autograd.grad(net(ids, segments([4, 3]), sink).sum(), [sink.anchor])
    wide, narrow = sink.combine(weights), sink.combine(weights, narrow=True)
    assert wide.keys() == narrow.keys() == {id(parameter) for parameter in net.parameters()}
    for parameter in net.parameters():
        found, expected = narrow[id(parameter)], wide[id(parameter)]
        assert expected.dtype == torch.float32 and found.shape == expected.shape == parameter.shape
        assert found.dtype == (torch.float32 if parameter is net.words else torch.bfloat16)
        assert torch.equal(found.bfloat16(), expected.bfloat16())


def test_a_rank_without_rows_still_takes_part_in_the_gathering() -> None:
    gathered: list[tuple[int, torch.Size]] = []

    class Ranks(Alone):
        def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
            gathered.extend((len(ids), rows.shape) for tasks in tables for ids, rows in tasks)
            return list(tables)

    net = Net()
    sink = StackSink(list(net.parameters()), 2, sparse=[net.words], ranks=Ranks())
    assert (sink.gramian() == 0).all()
    assert gathered == [(0, (0, 6))] * 2


def test_frozen_parameters_are_left_alone() -> None:
    net, ids = Net(), rows([4, 3])
    net.weight.requires_grad_(False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    sink = StackSink(trainable, 2, sparse=[net.words])
    with sink.armed(ids.device):
        torch.autograd.grad(net(ids, segments([4, 3]), sink).sum(), [sink.anchor])
    assert id(net.weight) not in sink.combine(torch.ones(2))


@pytest.mark.parametrize(("affine", "bias"), [(False, False), (True, False)])
@pytest.mark.parametrize("mode", ["stack", "gramian", "weighted"])
def test_a_layer_norm_without_weight_or_bias(mode: Mode, affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6, elementwise_affine=affine, bias=bias)
    words, parts, ids = nn.Parameter(torch.randn(11, 6)), segments([2, 3]), rows([2, 3])
    parameters = [words, *norm.parameters()]
    weights = torch.tensor([2.0, -1.0])
    sink = sink_of(mode, parameters, 2, weights=weights)

    def losses(sink: Sink | None) -> Tensor:
        x = functional.embedding(ids, words, parts, sink)
        return functional.layer_norm(x, norm.weight, norm.bias, norm.eps, parts, sink).pow(3).sum(1)

    expected = [torch.autograd.grad(norm(words[ids]).pow(3).split([2, 3])[t].sum(), parameters) for t in range(2)]
    with sink.armed(ids.device):
        loss = losses(sink).sum()
        sink.forward_done()
        loss.backward()
    if mode == "gramian":
        jacobian = torch.stack([torch.cat([gradient.flatten() for gradient in task]) for task in expected])
        torch.testing.assert_close(sink.gramian(), jacobian @ jacobian.T)
        return
    merged = sink.combine(weights) if mode == "stack" else {id(p): p.grad for p in parameters}
    for parameter, first, second in zip(parameters, *expected, strict=True):
        torch.testing.assert_close(merged[id(parameter)], 2 * first - second)


def test_rows_of_three_dimensions_are_refused() -> None:
    """An armed sink could not tell a row's task; otherwise torch's operations run."""
    net, sizes = Net(), [2, 3]
    sink, parts, ids = StackSink(list(net.parameters()), 2), segments(sizes), rows(sizes)
    flat, deep = torch.randn(5, 6), torch.randn(5, 2, 6)
    torch.testing.assert_close(functional.linear(deep, net.weight, net.bias, parts), deep @ net.weight.T + net.bias)
    with sink.armed(ids.device):
        with pytest.raises(UserError, match=r"linear: an input of shape \(5, 2, 6\) .*x.flatten\(0, -2\)"):
            functional.linear(deep, net.weight, net.bias, parts, sink)
        with pytest.raises(UserError, match=r"layer_norm: an input of shape \(5, 2, 5\)"):
            functional.layer_norm(deep[..., :5], net.gain, net.shift, 1e-5, parts, sink)
        with pytest.raises(UserError, match=r"embedding: an input of shape \(1, 5\) .*ids.flatten\(\)"):
            functional.embedding(ids[None], net.words, parts, sink)
        with pytest.raises(UserError, match="the segments end at row 5, but the input has 4 rows"):
            functional.linear(flat[:4], net.weight, net.bias, parts, sink)
