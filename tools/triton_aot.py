"""Compile the Triton kernels that a function launches, for a GPU that need not be present.

Usage: triton_aot.py FILE FUNCTION CAPABILITY, with the capability as 80 or 90. The script calls the
function of a Python file. Each launch in it only compiles its kernel, for the types, alignment and
constants that the launcher has chosen. Tensors may be on the CPU or meta; nothing is computed. One
JSON object per kernel is printed. The fixture in tests/kernels/conftest.py reads these objects;
compile_table.py imports this module.
"""

from __future__ import annotations

import ast
import collections
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_run = JITFunction.run


class AbsentGpu:
    """Stand-in for Triton's driver, with the methods that compilation calls."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Return a separate device number for each capability: Triton caches a device's target."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """A call of a kernel with its arguments.

    digest: hash of everything that decides the machine code, except Triton's version and the GPU.
    """

    kernel: JITFunction
    arguments: dict[str, Any]
    digest: str

    def compile(self, capability: int) -> Any:
        """Return Triton's compiled kernel for this capability."""
        triton.runtime.driver.set_active(AbsentGpu(capability))
        return _run(self.kernel, grid=None, warmup=True, **self.arguments)


def code(kernel: JITFunction) -> str:
    """Return the code of a kernel, the functions it calls and their constants, without docstrings.

    Triton's own cache key includes line numbers, so even a changed comment would compile everything
    again.
    """
    found: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        name = f"{function.__module__}.{function.__name__}"
        if name in found:
            return
        (definition,) = function.parse().body
        if ast.get_docstring(definition) is not None:
            definition.body = definition.body[1:]
        found[name] = ast.unparse(definition)
        for node in ast.walk(definition):
            if not isinstance(node, ast.Name):
                continue
            value = function.__globals__.get(node.id)
            if isinstance(value, JITFunction):
                visit(value)
            elif isinstance(value, triton.language.constexpr):
                found[f"{name} {node.id}"] = repr(value)

    visit(kernel)
    return "\n".join(found.values())


def launches(function: Callable[[], object], capability: int) -> list[Launch]:
    """Call `function` and return one launch for each different kernel that it needs.

    Nothing is compiled. capability: that of the GPU which Triton reports to the launchers.
    """
    found: dict[str, Launch] = {}

    def note(self: JITFunction, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        def skip_compilation(*, key: str, **_: Any) -> bool:
            digest = hashlib.sha256(f"{code(self)} {key}".encode()).hexdigest()
            found.setdefault(digest, Launch(self, arguments, digest))
            return True

        triton.knobs.runtime.jit_cache_hook = skip_compilation
        _run(self, grid=grid, warmup=True, **arguments)

    triton.runtime.driver.set_active(AbsentGpu(capability))
    JITFunction.run = note
    try:
        function()
    finally:
        JITFunction.run = _run
        triton.knobs.runtime.jit_cache_hook = None
    return list(found.values())


def notation(kind: Any, path: tuple[int, ...], attrs: dict[tuple[int, ...], Any]) -> Any:
    """Return a type in Triton's notation: "*bf16:16" is a pointer to bf16, aligned to 16 bytes."""
    if isinstance(kind, (list, tuple)):
        return [notation(inner, (*path, n), attrs) for n, inner in enumerate(kind)]
    return f"{kind}:16" if any(name == "tt.divisibility" for name, _ in attrs.get(path, [])) else kind


def describe(kernel: Any) -> dict[str, Any]:
    """Return types, constants and resources of a compiled kernel.

    The keys are the fields of Compiled in tests/kernels/conftest.py.
    """
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
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "dots": len(re.findall(r"\btt\.dot\b", kernel.asm["ttir"])),
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
    for launch in launches(getattr(module, name), int(capability)):
        print(json.dumps(describe(launch.compile(int(capability))), default=str))
