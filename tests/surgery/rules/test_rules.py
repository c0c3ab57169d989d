"""Layer rules: the task gradients of every ruled module, compared with T plain backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinks import Mode, sink_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from transformers.pytorch_utils import Conv1D

from fastmtl.bench.calls import operator_calls
from fastmtl.errors import UserError
from fastmtl.surgery.rules.table import RULES, find_rule
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.source import MergingSink

SORTED, MIXED = [0, 0, 0, 2, 2, -1], [2, 0, -1, 0, 2, 0]  # task 1 has no row, one row has no task
WEIGHTS = torch.tensor([2.0, 1.0, -0.5])
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # of the plain module
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`"),  # old, but in use
]
MODES: tuple[Mode, ...] = get_args(Mode)


class Rows:
    """Tasks of the rows of a batch. module: holds the sink's parameters."""

    def __init__(self, tasks: Sequence[int], num_tasks: int, module: nn.Module) -> None:
        self.batch, self._tasks = len(tasks), [task if task >= 0 else num_tasks for task in tasks]
        self._sizes = [list(tasks).count(task) for task in range(num_tasks)]
        self._known = dict(module.named_parameters())
        self._segments: dict[int, Segments] = {}

    def segments(self, n: int) -> Segments:
        if n not in self._segments:
            self._segments[n] = self._make(n)
        return self._segments[n]

    def _make(self, n: int) -> Segments:
        host = tuple(accumulate((size * (n // max(self.batch, 1)) for size in self._sizes), initial=0))
        order = sorted(range(self.batch), key=self._tasks.__getitem__)
        offsets = torch.tensor(host, dtype=torch.int32)
        return Segments(offsets, host, None if order == list(range(self.batch)) else torch.tensor(order))

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter | None:
        return self._known.get(name)


class Case(NamedTuple):
    """A module and its input for B rows. frozen: parameters without a gradient."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    frozen: tuple[str, ...] = ()
    sparse: bool = False


def randn(*shape: int, rows: int = 1) -> Callable[[int], Tensor]:
    """Return a function of B: a tensor with `rows` rows for each of the B rows."""
    return lambda batch: torch.randn(rows * batch, *shape, generator=torch.Generator().manual_seed(1))


def ids(batch: int) -> Tensor:
    return torch.randint(0, 9, (batch, 4), generator=torch.Generator().manual_seed(1))


def positions(batch: int) -> Tensor:
    return torch.tensor([[3, 0, 3, 8, 1]])


CASES = {
    "linear": Case(lambda: nn.Linear(6, 5), randn(6)),
    "linear, k rows": Case(lambda: nn.Linear(6, 5), randn(6, rows=3)),
    "linear, tokens": Case(lambda: nn.Linear(6, 5), randn(3, 6)),
    "linear without bias": Case(lambda: nn.Linear(6, 5, bias=False), randn(3, 6)),
    "linear with a frozen weight": Case(lambda: nn.Linear(6, 5), randn(3, 6), ("weight",)),
    "linear with a frozen bias": Case(lambda: nn.Linear(6, 5), randn(3, 6), ("bias",)),
    "Conv1D": Case(lambda: Conv1D(5, 6), randn(3, 6)),
    "Conv1D with a frozen weight": Case(lambda: Conv1D(5, 6), randn(3, 6), ("weight",)),
    "Conv1D with a frozen bias": Case(lambda: Conv1D(5, 6), randn(3, 6), ("bias",)),
    "embedding": Case(lambda: nn.Embedding(9, 5), ids),
    "embedding, sparse": Case(lambda: nn.Embedding(9, 5, padding_idx=3), ids, sparse=True),
    "embedding with padding": Case(lambda: nn.Embedding(9, 5, padding_idx=3), ids),
    "one row of ids": Case(lambda: nn.Embedding(9, 5), positions),
    "one row of ids, sparse": Case(lambda: nn.Embedding(9, 5, padding_idx=3), positions, sparse=True),
    "layer_norm": Case(lambda: nn.LayerNorm(6), randn(3, 6)),
    "layer_norm of two dimensions": Case(lambda: nn.LayerNorm([3, 6]), randn(2, 3, 6)),
    "layer_norm without bias": Case(lambda: nn.LayerNorm(6, bias=False), randn(6)),
    "layer_norm with a frozen weight": Case(lambda: nn.LayerNorm(6), randn(3, 6), ("weight",)),
    "rms_norm": Case(lambda: nn.RMSNorm(6), randn(3, 6)),
    "rms_norm of two dimensions": Case(lambda: nn.RMSNorm([3, 6], eps=0.1), randn(3, 6)),
    "group_norm": Case(lambda: nn.GroupNorm(2, 6), randn(6, 3, 2)),
    "group_norm, k rows": Case(lambda: nn.GroupNorm(3, 6, eps=0.1), randn(6, rows=2)),
    "group_norm with a frozen weight": Case(lambda: nn.GroupNorm(2, 6), randn(6, 3), ("weight",)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, (4,), padding="same", groups=2), randn(4, 7)),
    "conv2d": Case(lambda: nn.Conv2d(3, 5, (2, 3), stride=(1, 2), padding=(0, 1), dilation=2), randn(3, 7, 8)),
    "conv2d, k rows": Case(lambda: nn.Conv2d(3, 5, 2, stride=2, bias=False), randn(3, 4, 4, rows=2)),
    "conv2d, circular": Case(lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), randn(3, 4, 4)),
    "conv2d with a frozen weight": Case(lambda: nn.Conv2d(3, 5, 3), randn(3, 4, 4), ("weight",)),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2, padding="valid"), randn(2, 3, 4, 3)),
}


def make(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = case.make()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(name not in case.frozen)
    return module.to(dtype)


def output_gradient(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2))


def plain(case: Case, tasks: list[int], *, autocast: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run a module plainly, in float64 or with autocast, and backward three times, once per task.

    Returns the output of all rows, the gradient of the input from all rows, and J [3, P] float64.
    """
    module, x = make(case, torch.float32 if autocast else torch.float64), case.inputs(len(tasks))
    if x.is_floating_point():
        x = (x if autocast else x.double()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    if not x.is_floating_point() and len(x) == 1:
        y = y.expand(len(tasks), *y.shape[1:])
    per_row = (y * output_gradient(y)).flatten(1).sum(1).unflatten(0, (len(tasks), -1)).sum(1)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    losses = [per_row[[row for row, task in enumerate(tasks) if task == t]].sum() for t in range(3)]
    gradients = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([gradient.flatten() for gradient in found]) for found in gradients])
    dx = torch.autograd.grad(per_row.sum(), [x])[0] if x.requires_grad else None
    return y.detach(), dx, jacobian.double()


class Found(NamedTuple):
    """Results of one backward: output, the sink after it, the sink's parameters, input gradient."""

    y: Tensor
    sink: Any
    trained: list[nn.Parameter]
    dx: Tensor | None

    def merged(self) -> Tensor:
        """Return the sum of the task gradients with WEIGHTS, [P]; the Gramian sink has none."""
        if isinstance(self.sink, MergingSink):
            assert all(parameter.grad is None for parameter in self.trained)
            found = self.sink.combine(WEIGHTS)
            return torch.cat([found[id(parameter)].flatten() for parameter in self.trained])
        return torch.cat([parameter.grad.flatten() for parameter in self.trained])


def ruled(
    case: Case,
    mode: Mode,
    tasks: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    autocast: bool = False,
    other: bool = False,
) -> Found:
    """Run a module by its rule. other: forward uses other tensors than the sink's parameters."""
    module, x = make(case, dtype), case.inputs(len(tasks))
    if x.is_floating_point():
        x = x.to(dtype).requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    options: Any = {"weighted": {"weights": WEIGHTS}, "tensor": {"solve": lambda index, gram: WEIGHTS}}.get(mode, {})
    sink = sink_of(mode, trained, 3, sparse=trained if case.sparse else (), **options)
    rule, rows = find_rule(module), Rows(tasks, 3, module)
    assert rule is not None
    for name, parameter in list(module.named_parameters()) if other else ():
        setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    with sink.armed(x.device):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = rule(module, rows, sink, x)
        sink.forward_done()
        y.backward(output_gradient(y).to(y.dtype))
    return Found(y.detach(), sink, trained, x.grad)


def assert_near(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= bound * expected.double().norm() + 1e-12


@pytest.mark.parametrize("name", CASES)
def test_task_gradients(name: str) -> None:
    case = CASES[name]
    for tasks in (SORTED, MIXED):
        y, dx, jacobian = plain(case, tasks)
        for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
            for mode in MODES:
                found = ruled(case, mode, tasks, dtype)
                assert found.y.dtype == dtype
                assert_near(found.y, y, bound)
                if dx is not None:
                    assert found.dx is not None and found.dx.dtype == dtype
                    assert_near(found.dx, dx, bound)
                if mode in ("stack", "keep", "gramian"):
                    assert_near(found.sink.gramian(), jacobian @ jacobian.T, bound)
                if mode != "gramian":
                    assert_near(found.merged(), WEIGHTS.double() @ jacobian, bound)


@pytest.mark.parametrize("name", CASES)
def test_the_sink_gets_its_own_parameters(name: str) -> None:
    """Forward uses other tensors than the parameters that the sink knows, as in FSDP."""
    case = CASES[name]
    for mode in MODES:
        found = ruled(case, mode, MIXED, other=True)
        if mode in ("stack", "keep", "gramian"):
            assert torch.equal(found.sink.gramian(), ruled(case, mode, MIXED).sink.gramian())
        assert all(parameter.grad is None for parameter in found.trained)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_rows(name: str) -> None:
    case = CASES[name]
    empty, full = (ruled(case, "stack", tasks) for tasks in ([], MIXED))
    assert empty.y.shape == (0, *full.y.shape[1:])
    assert not empty.sink.gramian().any() and full.sink.gramian().any()


@pytest.mark.parametrize("name", CASES)
def test_plain_gradients_count_rows_of_no_task(name: str) -> None:
    case = CASES[name]
    module, x = make(case), case.inputs(len(MIXED))
    parameters, rule = [parameter for parameter in module.parameters() if parameter.requires_grad], find_rule(module)
    sink = sink_of("stack", parameters, 3, sparse=parameters if case.sparse else ())
    assert rule is not None
    with sink.armed(x.device), sink.totals():
        y = rule(module, Rows(MIXED, 3, module), sink, x)
        found = torch.autograd.grad(y.square().sum(), parameters)
    plain = module(x)
    expected = torch.autograd.grad(plain.expand(y.shape).square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str) -> None:
    """The task gradients have at most the error of plain autograd."""
    case = CASES[name]
    _, _, exact = plain(case, MIXED)
    y, _, theirs = plain(case, MIXED, autocast=True)
    found = ruled(case, "stack", MIXED, autocast=True)
    assert found.y.dtype == y.dtype
    assert_near(found.y, y, 2**-8)
    expected = WEIGHTS.double() @ exact
    error = (WEIGHTS.double() @ theirs - expected).norm()
    assert (found.merged().double() - expected).norm() <= 2 * error + 2**-9 * expected.norm()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_convolution(data: st.DataObject) -> None:
    dims, groups, k = (data.draw(st.integers(1, most)) for most in (3, 2, 2))
    tasks = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=6))
    kernel, stride, padding, dilation = (
        tuple(data.draw(st.integers(low, 3 - low)) for _ in range(dims)) for low in (1, 1, 0, 1)
    )
    channels = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate"]))
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    keywords = {"dilation": dilation, "groups": groups, "bias": data.draw(st.booleans()), "padding_mode": mode}
    settings = {"stride": stride, "padding": padding} if data.draw(st.booleans()) else {"padding": "same"}
    size = tuple(data.draw(st.integers(4, 5)) for _ in range(dims))
    case = Case(lambda: conv(*channels, kernel, **settings, **keywords), randn(channels[0], *size, rows=k))
    y, dx, jacobian = plain(case, tasks)
    found = ruled(case, "stack", tasks)
    assert dx is not None and found.dx is not None
    scale = float(jacobian.abs().sum()) + 1e-12
    for ours, exact in ((found.y, y), (found.dx, dx)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.merged().double(), WEIGHTS.double() @ jacobian, rtol=1e-5, atol=1e-5 * scale)


COUNTED = ["linear", "layer_norm", "rms_norm", "embedding", "embedding, sparse", "one row of ids"]


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("num_tasks", [2, 16])
@pytest.mark.parametrize("mode", ["stack", "gramian"])
def test_added_operator_calls(name: str, num_tasks: int, mode: Mode) -> None:
    """Forward and backward of unsorted rows call at most 10 + 10 T operators more than without."""
    case, tasks = CASES[name], 2 * list(range(num_tasks))
    module, x = make(case), case.inputs(len(tasks))
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    parameters, rule, rows = list(module.parameters()), find_rule(module), Rows(tasks, num_tasks, module)
    sink = sink_of(mode, parameters, num_tasks, sparse=parameters if case.sparse else ())
    assert rule is not None

    def ours() -> None:
        y = rule(module, rows, sink, x)
        torch.autograd.grad(y, [sink.anchor, *parameters, *inputs], torch.ones_like(y), allow_unused=True)

    def theirs() -> None:
        y = module(x)
        torch.autograd.grad(y, [*parameters, *inputs], torch.ones_like(y))

    with sink.armed(x.device):
        ours()  # J and the segments are made once
        sink.clear()
        added = operator_calls(ours).outermost - operator_calls(theirs).outermost
    assert 0 < added <= 10 + 10 * num_tasks


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OtherConvolution(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Named(nn.Linear):
    """A class with nn.Linear's forward."""


def replaced() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda input: input  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(2, 2),
        replaced,
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
        lambda: weight_norm(nn.Linear(2, 2)),
        lambda: OtherConvolution(2, 2, 2),
        lambda: nn.Embedding(2, 2, max_norm=1.0),
        lambda: nn.Embedding(2, 2, scale_grad_by_freq=True),
        lambda: nn.Embedding(2, 2, sparse=True),
        lambda: nn.Bilinear(2, 2, 2),
        lambda: nn.BatchNorm1d(2),
        lambda: nn.ConvTranspose1d(2, 2, 2),
    ],
)
def test_modules_without_a_rule(make: Callable[[], nn.Module]) -> None:
    assert find_rule(make()) is None


def test_a_subclass_with_the_forward_of_its_base_has_the_rule() -> None:
    assert find_rule(Named(2, 2)) is RULES[nn.Linear.forward]


def test_an_input_without_rows_is_refused() -> None:
    module = nn.Conv1d(2, 3, 2)
    sink, rows = sink_of("stack", list(module.parameters()), 3), Rows([0, 1], 3, module)
    with pytest.raises(UserError, match=r"Conv1d: an input of shape \(2, 5\) has no dimension for the rows"):
        RULES[nn.Conv1d.forward](module, rows, sink, torch.zeros(2, 5))
