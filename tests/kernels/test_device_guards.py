"""Every Triton kernel is launched on the device of its tensors, which may not be the current one.

Triton launches on the current device, so a model on `cuda:1` needs `torch.cuda.device_of` around
each launch. The calls of the compile table reach every launcher without a GPU; no kernel is
compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmtl_kernels

SOURCES = sorted(Path(fastmtl_kernels.__file__).parent.rglob("*.py"))


def test_every_launch_is_inside_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    import compile_cases
    import triton_aot

    guards: list[Tensor] = []
    launched: dict[str, bool] = {}

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        guards.append(tensor)
        yield
        guards.pop()

    def note(kernel: Any, *_: Any, **arguments: Any) -> None:
        name = kernel.fn.__name__
        launched[name] = launched.get(name, True) and bool(guards)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(jit.JITFunction, "run", note)
    monkeypatch.setattr(jit.driver, "_active", triton_aot.AbsentGpu(90))  # for launchers that ask for the target
    for case in compile_cases.CASES:
        case()
    assert [name for name, guarded in launched.items() if not guarded] == []
    named = {name for path in SOURCES for name in re.findall(r"(\w+_kernel)\[", path.read_text())}
    assert launched.keys() == named, "a launcher without a call in tools/compile_cases.py, or one that is gone"
