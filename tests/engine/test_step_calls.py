"""The host's work in a step. A GPU is idle while the host launches kernels or waits for a number.

All of BERT-base's 12 layers, bf16, three tasks, ZeRO 1, one process. DeepSpeed alone makes 7,800 of
the calls without flat parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import run_script
from torch import Tensor

from fastmtl.bench.waits import host_waits

SCRIPT = Path(__file__).with_name("step_calls_cases.py")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = json.loads(run_script(SCRIPT, timeout=300).splitlines()[-1])
    return result


@pytest.mark.slow(12)
@pytest.mark.parametrize(
    ("way", "calls"), [("pcgrad", 13_000), ("pcgrad, flat", 6_000), ("pcgrad, flat, graphs", 900), ("sum", 13_000)]
)
def test_calls_of_operators(found: dict[str, dict[str, Any]], way: str, calls: int) -> None:
    """Nested calls are included; with graphs, only calls outside them count."""
    assert 100 < found[way]["outside"] <= calls


@pytest.mark.slow(12)
@pytest.mark.parametrize("way", ["pcgrad", "pcgrad, flat", "pcgrad, flat, graphs", "sum"])
def test_waits_once(found: dict[str, dict[str, Any]], way: str) -> None:
    """One wait for losses, G, weights and finiteness, or for losses and the norm."""
    assert len(found[way]["waits"]) == 1, found[way]["waits"]
    assert found[way]["waits"][0].startswith(("cpu: surgery/solver.py", "tolist: steps/joint.py"))


@pytest.mark.slow(12)
@pytest.mark.parametrize("way", ["zero 1", "zero 0", "zero 2, flat"])
def test_a_joint_step_that_is_not_finite_leaves_no_trace(found: dict[str, dict[str, Any]], way: str) -> None:
    """ZeRO 1 and 2 drop its gradients; later steps equal those of a run without it bit for bit."""
    first, second, third = found[f"skip, {way}"]["skipped"]
    assert (first, third) == (None, None) and second.endswith("LayerNorm.bias")
    assert found[f"skip, {way}"]["same"]


def on_device() -> Tensor:
    return torch.arange(4.0).new_tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda x: x[0].item(), "item"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: bool(x[0] > 0), "__bool__"),
        (lambda x: float(x.sum()), "__float__"),
        (lambda x: x.cpu().tolist(), "cpu"),
        (lambda x: x.unique(), "aten::_unique2"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: x[x > 2], "aten::index"),
        (lambda x: x.masked_select(x > 2), "aten::masked_select"),
        (lambda x: x.repeat_interleave(x.long()), "aten::repeat_interleave"),
        (lambda x: torch.tensor([1, 2], device=x.device), "tensor of numbers on a device"),
        (lambda x: torch.tensor([1, 2]).to(x.device), "a copy to the device"),
        (lambda x: x.copy_(torch.tensor([1, 2, 3, 4])), "a copy to the device"),
    ],
)
def test_waits_are_seen(call: Any, what: str) -> None:
    x = on_device()
    found = [line.rsplit(": ", 1)[0] for line in host_waits(lambda: call(x))]
    assert found == [what]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * 2 + x.sum(),
        lambda x: torch.randperm(4).tolist(),
        lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
        lambda x: x.copy_(torch.tensor([1, 2, 3, 4]), non_blocking=True),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64), output_size=4),
    ],
)
def test_what_does_not_wait(call: Any) -> None:
    x = on_device()
    assert host_waits(lambda: call(x)) == []
