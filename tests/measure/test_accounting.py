"""Tensor accounting on models whose bytes can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl.measure import ranges
from fastmtl.measure.accounting import Accounting
from fastmtl.measure.parts import PARTS

CPU = torch.device("cpu")
ROWS = 1000


def test_live_bytes_are_those_of_storages() -> None:
    accounting = Accounting(CPU)
    with accounting:
        x = torch.zeros(10, 100)
        view = x.t()[3:]
        y = x + 1
        assert accounting.live_bytes() == 2 * 4000
        del x
        assert accounting.live_bytes() == 2 * 4000  # the view keeps the storage
        del view
        assert accounting.live_bytes() == 4000
        del y
    assert accounting.live_bytes() == 0
    assert accounting.peak().nbytes == 8000


def test_a_storage_that_is_used_again_is_another() -> None:
    accounting = Accounting(CPU)
    with accounting:
        for _ in range(5):
            torch.zeros(1 << 20).add_(1)
    assert accounting.live_bytes() == 0
    assert accounting.peak().nbytes == 4 << 20


def step(accounting: Accounting, model: nn.Module, x: Tensor) -> None:
    with accounting, ranges.listening(accounting.on_range):
        with ranges.profile_range("forward"):
            loss = model(x).square().mean()
        with ranges.profile_range("backward"):
            loss.backward()


def test_parts_of_a_step() -> None:
    """Two linear layers with a GELU keep GELU's input and output, the square's input, the loss."""
    model = nn.Sequential(nn.Linear(20, 50), nn.GELU(), nn.Linear(50, 30))
    accounting = Accounting(CPU)
    accounting.name(model.parameters(), "weights")
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: accounting.name([gradient], "gradients"))
    step(accounting, model, torch.randn(ROWS, 20))
    peak = accounting.peak(within="forward")
    assert set(peak.parts) == set(PARTS)
    assert peak.parts["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert peak.parts["activations"] == 4 * (ROWS * (50 + 50 + 30) + 1)
    assert peak.parts["gradients"] == peak.parts["optimiser"] == peak.parts["task gradients"] == 0
    # After the step, only gradients and weights are alive.
    accounting.reset_peak()
    assert accounting.peak().parts["gradients"] == peak.parts["weights"]
    assert accounting.live_bytes() == 2 * peak.parts["weights"]


def test_what_checkpointing_makes_again_is_an_activation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(20, 50), nn.GELU(), nn.Linear(50, 20))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.inner, x, use_reentrant=False)
            return x

    model, x = Twice(), torch.randn(ROWS, 20, requires_grad=True)
    accounting = Accounting(CPU)
    accounting.name([*model.parameters(), x], "weights")
    accounting.watch_recomputation([model.inner])
    step(accounting, model, x)
    between = 4 * ROWS * 20
    assert (
        accounting.peak(within="forward").parts["activations"] == between
    )  # the output of the first forward, in the second one
    again = accounting.peak(within="backward").parts["activations"]
    assert again == pytest.approx(4 * ROWS * (50 + 50) + between, abs=between)


def test_the_peak_is_of_the_named_range() -> None:
    accounting = Accounting(CPU)
    with accounting, ranges.listening(accounting.on_range):
        with ranges.profile_range("forward"):
            torch.zeros(100)
        with ranges.profile_range("optimiser"):
            torch.zeros(1000)
    assert accounting.peak().range == "optimiser"
    assert accounting.peak().nbytes == accounting.peak("optimiser").nbytes == 4000
    assert accounting.peak("forward").nbytes == 400
