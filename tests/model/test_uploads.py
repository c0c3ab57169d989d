"""Copies of a step to a device: one pinned copy for which the host does not wait (`upload`)."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastmtl
import fastmtl_kernels
from fastmtl.data import packed_batch
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.prefetch import ahead
from fastmtl.model.encoder.context import ForwardContext
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

# Made once and kept; and the flag of several ranks, which the host reads at once.
WAIT = {("common.py", "dropout_table"), ("distributed.py", "any"), ("step_losses.py", "check")}


def _copies(path: Path) -> Iterator[tuple[str, str]]:
    """Return the functions that copy numbers of the host to a device from pageable memory."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                    on_device = any(keyword.arg == "device" for keyword in call.keywords)
                    if call.func.attr == "new_tensor" or (call.func.attr in ("tensor", "as_tensor") and on_device):
                        yield path.name, function.name


def test_no_step_makes_a_tensor_of_numbers_on_a_device() -> None:
    folders = [Path(fastmtl.__file__).parent / name for name in ("cuda_graphs", "data", "engine", "model", "surgery")]
    folders.append(Path(fastmtl_kernels.__file__).parent)
    found = {copy for folder in folders for path in folder.rglob("*.py") for copy in _copies(path)}
    assert found <= WAIT


class _Copies(TorchDispatchMode):
    """Copies from the CPU to the device meta, in place of a GPU: whether they are non-blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_meta:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
            if isinstance(source, Tensor) and source.device.type == "cpu" and source.dim():
                self.found.append(bool(kwargs.get("non_blocking") or args[2:]))
        return result


def test_a_batch_brings_its_plan(make_batch: Callable[..., PackedBatch], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that makes a batch makes its plan and copies both; else forward makes the plan."""
    monkeypatch.setattr(packed_batch, "needs_plan", lambda device: device.type == "meta")
    batch, device = make_batch([[5, 70], [], [3, 30]]), torch.device("meta")
    host = AttentionPlan.make(batch.host.cu_seqlens, batch.num_tokens)
    for depth in (0, 2):
        with ahead(iter([[batch]]), depth, device) as steps:
            ((made,),) = steps
        assert made.plan is not None and made.plan.numbers.is_meta and made.host == batch.host
        assert made.host.plan is not None and torch.equal(made.host.plan.numbers, host.numbers)
        with monkeypatch.context() as patch:
            patch.setattr(AttentionPlan, "make", None)  # no plan is made any more
            assert ForwardContext.build(made, 1, training=False).plan is made.plan
            wider = made.host.plan_of(200)
        assert torch.equal(wider.numbers, AttentionPlan.make(batch.host.cu_seqlens, 200).numbers)
    assert batch.plan is None and batch.to("cpu").plan is None
    with _Copies() as copies:
        bare = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
        assert ForwardContext.build(bare, 1, training=False).plan is not None
        task = ForwardContext.build(made, 1, training=False).of_task(0)
        assert task.plan is not None and task.plan.num_rows == 75
    assert len(copies.found) > 8 and all(copies.found)
