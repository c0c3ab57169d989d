"""`storage: kept`, compared with `stacked`: equal Gramian and merged gradient, and its memory.

All uses of a parameter are covered.
"""

from __future__ import annotations

from typing import Any, cast

import deepspeed_cases as cases
import pytest
import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery, SurgeryInfo
from fastmtl.surgery.functional import embedding, layer_norm, linear
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.keep import KeepSink
from fastmtl.surgery.sinks.sink import Sink

TASKS, ROWS = ["a", "b", "c"], (5, 0, 7)  # b has no rows
NUM_ROWS = sum(ROWS) + 2  # two rows belong to no task


class Net(nn.Module):
    """A weight used twice, a dense table, a compact table, and a table that a Linear uses, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types = nn.Embedding(20, 8), nn.Embedding(8, 8)
        self.norm, self.twice, self.wide = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.heads = nn.ModuleList([nn.Linear(16, 1) for _ in TASKS])

    def forward(self, seed: int, sink: Sink | None) -> dict[str, tuple[Tensor, int]]:
        ids = torch.randint(0, 8, (NUM_ROWS,), generator=torch.Generator().manual_seed(seed))
        host = (0, 5, 5, 12)
        segments = Segments(torch.tensor(host, dtype=torch.int32), host)
        x = embedding(ids, self.words.weight, segments, sink) + embedding(ids, self.types.weight, segments, sink)  # type: ignore[arg-type]
        x = layer_norm(x, self.norm.weight, self.norm.bias, 1e-5, segments, sink)
        for _ in range(2):
            x = x + linear(x, self.twice.weight, self.twice.bias, segments, sink).tanh()  # type: ignore[arg-type]
        y = linear(x, self.wide.weight, None, segments, sink)  # type: ignore[arg-type]
        y = y + linear(x, self.types.weight, None, segments, sink).repeat(1, 2)  # type: ignore[arg-type]
        pieces = zip(TASKS, self.heads, segments.split(y), strict=True)
        return {name: (head(piece).square().sum(), len(piece)) for name, head, piece in pieces}

    def shared(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("heads")]


def surgery_on(net: Net, storage: Any, **options: Any) -> GradientSurgery:
    options = {"sparse": [net.words.weight], "shared": net.shared(), "seed": 3, **options}
    return GradientSurgery(torch.optim.SGD(net.parameters()), tasks=TASKS, storage=storage, **options)


def step(net: Net, storage: Any, micro_batches: int = 1, **options: Any) -> tuple[SurgeryInfo, dict[str, Tensor]]:
    surgery = surgery_on(net, storage, **options)
    counts = {name: rows * micro_batches for name, rows in zip(TASKS, ROWS, strict=True)}
    info = surgery.run(list(range(micro_batches)), lambda seed, task_grads: net(seed, task_grads), counts)
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return info, found


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_stacked(micro_batches: int, dtype: torch.dtype) -> None:
    """Rounding in bfloat16: `stacked` rounds every product of J, `kept` the merged one."""
    net = Net().to(dtype)
    (expected, merged), (info, found) = (step(net, storage, micro_batches) for storage in ("stacked", "kept"))
    assert found.keys() == merged.keys()
    exact = dtype == torch.float32
    bound = 1e-6 if exact else 1e-2
    for ours, theirs in ((info.task_norms, expected.task_norms), (info.cosines, expected.cosines)):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, equal_nan=True)
    total = torch.cat([value.flatten().float() for value in merged.values()]).norm()
    for name, value in merged.items():
        assert found[name].dtype == dtype
        assert (found[name] - value).norm() <= (1e-6 if exact else 2**-7) * total, name
    assert info.conflict_rate == expected.conflict_rate and info.losses == expected.losses


def test_dropout_and_recomputation_of_a_real_model() -> None:
    """Kept tensors are not overwritten later in backward."""
    recipe = cases.make_recipe(cases.Case(1, 1, "pcgrad"))
    found = {}
    for storage, recompute in cast(Any, (("stacked", "none"), ("kept", "none"), ("kept", "cheap"), ("kept", "full"))):
        model = cases.make_model(recipe).train()
        model.encoder.recompute = recompute
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        optimizer = torch.optim.SGD(model.parameters())
        surgery = GradientSurgery(
            optimizer, tasks=recipe.task_names, shared=model.shared_parameters(), storage=storage, seed=3
        )
        torch.manual_seed(5)
        batch = cases.step_batches(cases.make_data(), 0, 0, 1)
        info = surgery.run([batch], lambda b, task_grads, net=model: net(b, task_grads))
        assert info.cosines is not None
        found[storage, recompute] = info.cosines, torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = found.pop(("stacked", "none"))
    for way, (cosines, merged) in found.items():
        assert (cosines - expected[0]).abs().max() <= 1e-6, way
        assert (merged - expected[1]).norm() <= 1e-6 * expected[1].norm(), way


def test_what_is_kept() -> None:
    """Inputs (once for two Linears), output gradients, and T gradients of small parameters."""
    net = Net()
    surgery = surgery_on(net, "kept")
    sink = surgery._sink
    assert isinstance(sink, KeepSink)
    made: list[int] = []
    merge = sink.combine

    def combine(weights: Tensor, *, narrow: bool) -> Merged:
        inputs = [pair.x for pairs in sink._pairs.values() for pair in pairs]
        made.append(sum({t.data_ptr(): t.nbytes for t in [*sink.tensors(), *inputs]}.values()))
        return merge(weights, narrow=narrow)

    sink.combine = combine  # type: ignore[method-assign, assignment]
    info = surgery.run([0], lambda seed, task_grads: net(seed, task_grads))
    rows = sum(ROWS)
    inputs_and_gradients = rows * 4 * (8 * (2 + 1) + 8 * (2 + 1) + 16)
    small = 3 * 4 * (8 + 8 + 8 + 8 * 8)  # weight and bias of the norm, the bias, the dense table
    compact = rows * (8 * 4 + 8)
    products = 3 * 4 * 8 * 16
    assert made == [inputs_and_gradients + small + compact]
    assert info.nbytes == made[0] + products
    assert all(not pairs for pairs in (sink._pairs, sink._delivered))  # nothing is kept until the next step


def test_a_step_that_is_skipped_keeps_nothing() -> None:
    net = Net()
    surgery = surgery_on(net, "kept")
    losses = net(0, surgery.task_grads)
    losses["c"] = (losses["c"][0] * float("nan"), losses["c"][1])
    info = surgery.backward(losses)
    assert info is not None and info.skipped == "c" and not surgery.kept_tensors()
    assert all(p.grad is None for p in net.parameters())


def test_float16_with_a_large_loss_scale() -> None:
    """The weights of the tasks include the inverse scale: weighted rows would round to zeros."""
    net = Net()
    sink = KeepSink([net.wide.weight], 2)  # type: ignore[list-item]
    torch.manual_seed(1)
    dy, x = torch.randn(6, 16).half() * 100, torch.randn(6, 8).half()
    segments = Segments(torch.tensor([0, 2, 6], dtype=torch.int32), (0, 2, 6))
    with sink.armed(dy.device):
        sink.linear(net.wide.weight, None, dy, x, segments, (True, False))  # type: ignore[arg-type]
    weights = torch.tensor([3.0, -1.0])
    (merged,) = sink.combine(weights / 2**24).values()
    expected = (dy.double() * segments.per_row(weights.double())[:, None]).T @ x.double()
    assert (merged.double() * 2**24 - expected).norm() <= 2**-9 * expected.norm()


@pytest.mark.parametrize("way", ["run", "backward"])
def test_a_model_of_other_layers_is_refused(way: str) -> None:
    net = Net()
    surgery = surgery_on(net, "kept")
    with pytest.raises(UserError, match="storage='kept' needs one backward pass for all tasks"):
        surgery.run([0], lambda seed: net(seed, None)) if way == "run" else surgery.backward(net(0, None))
