"""Triton kernels without a GPU: run in its interpreter, and compiled for GPUs that are absent."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import repair

from fastmtl_kernels import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":  # in the process that `interpret` starts
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
    """Mark the tests that compile or interpret kernels in a process of their own as slow."""
    for item in items:
        if {"compile_ahead", "interpret"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow(8))


@pytest.fixture
def interpret() -> Callable[..., None]:
    """interpret(file, ...): run the tests of files in one process with TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def run_files(*files: str | Path) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        passed = re.findall(r"\b(\d+) passed", ran.stdout)
        assert ran.returncode == 0 and passed and int(passed[0]) >= len(files), ran.stdout + ran.stderr

    return run_files


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
        command = [sys.executable, str(script), inspect.getfile(function), function.__name__, str(capability)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the modules that the test's file imports
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return [Compiled(**json.loads(line)) for line in ran.stdout.splitlines()]

    return compile_for
