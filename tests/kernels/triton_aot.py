"""Compiles the Triton kernels that a function launches, for a GPU that need not be there, and tells what came out.

Usage: triton_aot.py FILE FUNCTION CAPABILITY, the capability as 80 or 90. Calls the function of a Python file with
Triton's launches replaced by compilation, so that types, alignment and constants are what the launchers choose.
Tensors may be on the CPU or meta; nothing is computed. Prints one JSON object per kernel; the fixture in conftest.py
reads them.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


class AbsentGpu:
    """As much of Triton's driver as compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(function: Any, capability: int) -> list[Any]:
    """Triton's kernels of the launches in a call, each once."""
    kernels: dict[int, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[id(kernel)] = kernel
        return kernel

    triton.runtime.driver.set_active(AbsentGpu(capability))
    JITFunction.run = compile_only
    function()
    return list(kernels.values())


def notation(kind: Any, path: tuple[int, ...], attrs: dict[tuple[int, ...], Any]) -> Any:
    """An argument's type as Triton's own compiler writes it: "*bf16:16" is a pointer to bf16, aligned to 16 bytes."""
    if isinstance(kind, (list, tuple)):
        return [notation(inner, (*path, n), attrs) for n, inner in enumerate(kind)]
    return f"{kind}:16" if any(name == "tt.divisibility" for name, _ in attrs.get(path, [])) else kind


def describe(kernel: Any) -> dict[str, Any]:
    """The fields of conftest.Compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    source = kernel.src
    return {
        "name": source.name,
        "signature": {
            name: notation(kind, (n,), source.attrs)
            for n, (name, kind) in enumerate(source.signature.items())
            if kind != "constexpr"
        },
        "constants": {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()},
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": kernel.metadata.shared,
        "instructions": collections.Counter(INSTRUCTION.findall(report)),
    }


if __name__ == "__main__":
    file, name, capability = sys.argv[1:]
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kernel in compiled_by(getattr(module, name), int(capability)):
        print(json.dumps(describe(kernel), default=str))
