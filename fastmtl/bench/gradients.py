"""gramian and combine against a memory copy of as many bytes, by turns in one run.

gramian reads T P numbers; combine reads T P and writes P. The copy beside each reads and writes as many in all, so the
copy's time over the operation's is the share of the memory's speed that the operation reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmtl.bench.environment import environment
from fastmtl.bench.harness import Say, interleave, summary
from fastmtl_kernels import combine, gramian, implementations, reference

# BERT-base.
NUM_COLUMNS = 110_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPERATIONS = ("gramian", "combine", "both")
COPY = "copy"
# Of inner products, relative to the norms; and of merged gradients, to the sum of |weight| |gradient|: rounding of the
# accumulator, beside that of the result to its dtype.
TOLERANCE = 1e-5


class WrongResult(RuntimeError):
    """An implementation does not agree with the reference: its time would mean nothing."""


def bench_gradients(
    device: torch.device,
    rounds: int,
    say: Say,
    tasks: int = 3,
    columns: int = NUM_COLUMNS,
    commit: str | None = None,
) -> dict[str, Any]:
    """Every implementation there is on the device, in float32 and bfloat16, JSON-ready.

    gb_per_s: bytes read and written, in 10^9, over the median. share_of_copy: of the copy's speed. commit: see
    environment(). Raises WrongResult before the implementation's dtype is timed.
    """
    entries = implementations(device)["gramian"]
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        say(f"task gradients in {name}")
        grads = torch.randn(tasks, columns, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
        weights = torch.linspace(-1, 1, tasks, device=device)
        steps: dict[str, Callable[[], object]] = {}
        for entry in entries:
            if entry.available:
                if entry.impl != "reference":
                    say(f"checking results: {entry.impl}, {name}")
                    _check(grads, weights, entry.impl)
                steps.update(_steps(grads, weights, entry.impl))
        steps.update(_copies(grads))
        say(f"times in {name}")
        found[name] = _rates(interleave(steps, rounds, say, device), grads)
    return {
        "benchmark": "gradients",
        "environment": environment(device, commit),
        "tasks": tasks,
        "columns": columns,
        "rounds": rounds,
        "dtypes": found,
        "unavailable": {entry.impl: entry.reason for entry in entries if not entry.available},
    }


def _steps(grads: Tensor, weights: Tensor, impl: Any) -> dict[str, Callable[[], object]]:
    out = torch.empty_like(grads[0])
    return _three(impl, lambda: gramian(grads, impl), lambda: combine(grads, weights, out, impl))


def _copies(grads: Tensor) -> dict[str, Callable[[], object]]:
    """Copies of as many bytes, half of them read and half written, between the same two buffers."""
    sizes = [_numbers(operation, *grads.shape) // 2 for operation in ("gramian", "combine")]
    source, target = grads.view(-1), grads.new_zeros(max(sizes))
    return _three(COPY, *(partial(target[:size].copy_, source[:size]) for size in sizes))


def _three(impl: str, first: Callable[[], object], second: Callable[[], object]) -> dict[str, Callable[[], object]]:
    return {f"gramian {impl}": first, f"combine {impl}": second, f"both {impl}": lambda: (first(), second())}


def _numbers(operation: str, tasks: int, columns: int) -> int:
    """Read and written."""
    return {"gramian": tasks, "combine": tasks + 1, "both": 2 * tasks + 1}[operation] * columns


def _check(grads: Tensor, weights: Tensor, impl: Any) -> None:
    rows = [[row] for row in grads]
    wanted = reference.gramian(rows)
    norms = wanted.diagonal().sqrt()
    error = ((gramian(grads, impl) - wanted).abs() / (norms[:, None] * norms)).max().item()
    if not error <= TOLERANCE:
        raise WrongResult(f"gramian, impl={impl!r}, {grads.dtype}: off by {error:.1e} of the norms, so it is not timed")
    merged = torch.empty_like(grads[0], dtype=torch.float32)
    reference.combine(rows, weights, [merged])
    found = combine(grads, weights, torch.empty_like(merged), impl)
    assert isinstance(found, Tensor)
    difference = (found.sub_(merged)).norm().item()
    error = difference / (weights.abs() * norms).sum().item()
    if not error <= TOLERANCE:
        raise WrongResult(f"combine, impl={impl!r}, {grads.dtype}: off by {error:.1e} of the norms, so it is not timed")


def _rates(samples: dict[str, list[float]], grads: Tensor) -> dict[str, dict[str, Any]]:
    """{operation: {implementation or "copy": times, GB/s and share}}."""
    rates: dict[str, dict[str, Any]] = {operation: {} for operation in OPERATIONS}
    for name, seconds in samples.items():
        operation, impl = name.split()
        entry = summary(seconds)
        entry["gb_per_s"] = _numbers(operation, *grads.shape) * grads.itemsize / entry["median_s"] / 1e9
        rates[operation][impl] = entry
    for impls in rates.values():
        for entry in impls.values():
            entry["share_of_copy"] = impls[COPY]["median_s"] / entry["median_s"]
    return rates
