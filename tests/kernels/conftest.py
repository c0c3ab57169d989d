"""Triton kernels without a GPU: run in its interpreter, and compiled for GPUs that are absent."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scripts import run_script
from triton_interpreter import repair

from fastmtl_kernels import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":  # in the process that test_interpreter.py starts
    repair()


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled kernel.

    signature: the types of its arguments, "*bf16:16" for a pointer to bf16 that is aligned to 16
    bytes. warps: of a block. dots: of its source. registers, spilled: registers and bytes spilled
    per thread. shared: bytes of shared memory of a block. instructions: counts of the machine code,
    {"LDG.E.128": 6, ...}; HMMA and HGMMA are those of the tensor cores.
    """

    name: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    dots: int
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]


@pytest.hookimpl(tryfirst=True)  # tests/conftest.py then puts slow tests first
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that compile kernels in a process of their own as slow."""
    for item in items:
        if "compile_ahead" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow(8))


@pytest.fixture(scope="module")
def on_cpu_tensors() -> Iterator[None]:
    """Let impl="triton" take CPU tensors, as the interpreter does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "refusal", lambda *_: None)
        yield


@pytest.fixture
def compile_ahead(tmp_path: Path) -> Callable[[Callable[[], None], int], list[Compiled]]:
    """compile_ahead(function, 90): compile the Triton kernels that a function launches, for sm_90.

    The function is called in its own process, on CPU or meta tensors. Its launches compile, and
    compute nothing.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def compile_for(function: Callable[[], None], capability: int) -> list[Compiled]:
        script = Path(__file__).parents[2] / "tools" / "triton_aot.py"
        arguments = (inspect.getfile(function), function.__name__, capability)
        printed = run_script(script, *arguments, TRITON_CACHE_DIR=str(tmp_path))
        return [Compiled(**json.loads(line)) for line in printed.splitlines()]

    return compile_for
