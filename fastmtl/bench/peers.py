"""Comparison of PCGrad's implementations on the same rows: time, memory, and the largest batch.

The memory of a step has a fixed part and a part that grows with the rows: peak(rows) = fixed +
slope * rows. The peaks at two numbers of rows give this line. Without a GPU, the largest batch is
where the line meets the memory limit. On a GPU, it is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastmtl.bench.sizes import PRECISIONS, Size
from fastmtl.bench.surgery import bench_variants, gpu_peak_of, peak_of
from fastmtl.bench.variants import JOINT
from fastmtl.bench.workload import Workload
from fastmtl.errors import UserError
from fastmtl.measure.harness import MIB, Keep, Say, in_own_process, resident_bytes

# Variants in the table, and their labels there.
SHOWN = {
    "autograd": "joint step",
    "pcgrad stacked": "fastmtl PCGrad",
    "pcgrad replay": "fastmtl PCGrad, replay",
    "textbook": "textbook PCGrad",
    "torchjd": "TorchJD PCGrad",
    "torchjd autogram": "TorchJD PCGrad, autogram",
}
GROWTH = 2  # factor from the first number of rows to the second
CLOSE = 0.97  # a batch that needs at least this share of the limit counts as the largest
LESS = 0.9  # factor for the next number of rows after a try ran out of memory
TRIES = 6
PRELOAD = "fastmtl.bench.surgery"  # imported by the fork server of the measured processes


def bench_peers(
    size: Size,
    rounds: int,
    say: Say,
    limit_gib: float = 24,
    commit: str | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Measure time and memory of every implementation in SHOWN, and return the result, JSON-ready.

    size: its tokens are ignored; each task has the shape's number of rows. limit_gib: GPU memory
    that the batch must fit. keep: called with the result so far after each implementation whose
    memory is known. memory_mib in the result: memory of a step with AdamW, which is the measured
    peak beyond an idle process, and AdamW's two moments. largest_rows: rows of each task in the
    largest batch.

    Raises GradientMismatch like bench_variants, and UserError if peaks cannot be measured.
    """
    size = dataclasses.replace(size, tokens=None)
    result = bench_variants(size, rounds, say, tuple({**dict.fromkeys(JOINT), **dict.fromkeys(SHOWN)}), commit)
    cuda = size.device == "cuda"
    say("peak memory of an idle process")
    idle = 0 if cuda else in_own_process(_idle, torch.get_num_threads(), preload=PRELOAD)
    if idle is None:
        raise UserError("peak memory cannot be measured here: it needs Linux, or --device cuda")
    moments = 2 * size.shape.parameters * PRECISIONS[size.precision].itemsize
    variants: dict[str, Any] = {}
    kept = ("environment", "shape", "precision", "tasks", "rounds", "tokens", "padded_tokens", "skipped")
    found = {
        "benchmark": "peers",
        **{key: result[key] for key in kept},
        "limit_gib": limit_gib,
        "largest": "measured" if cuda else "predicted",
        "peers": variants,
    }
    for name, shown in SHOWN.items():
        if name not in result["variants"]:
            continue

        def peak(rows: int, name: str = name) -> int:
            say(f"peak memory: {SHOWN[name]}, {rows} rows")
            return (
                _peak(name, dataclasses.replace(size, shape=dataclasses.replace(size.shape, rows=rows)))
                - idle
                + moments
            )

        entry = result["variants"][name]
        first = int(entry["peak_mib"] * MIB) - idle + moments
        points = {size.shape.rows: first, GROWTH * size.shape.rows: peak(GROWTH * size.shape.rows)}
        fixed, slope = line(points)
        rows = max(int((limit_gib * 1024 * MIB - fixed) // slope), 0)
        if cuda:
            rows = _measured_largest(peak, points, rows, limit_gib * 1024 * MIB)
        variants[shown] = {
            **{key: entry[key] for key in ("median_s", "p20_s", "p80_s", "samples_s", "error")},
            "memory_mib": first / MIB,
            "fixed_mib": fixed / MIB,
            "mib_per_row": slope / MIB,
            "largest_rows": rows,
        }
        for ratio, key in (("ratio_to_joint", "median_s"), ("memory_to_joint", "memory_mib")):
            variants[shown][ratio] = variants[shown][key] / variants[SHOWN["autograd"]][key]
        if keep is not None:
            keep(found)
    return found


def line(points: dict[int, int]) -> tuple[float, float]:
    """Return (value at 0, slope) of the line through the two points with the most rows.

    points: peak bytes by number of rows. Raises UserError if the peak does not grow.
    """
    (x0, y0), (x1, y1) = sorted(points.items())[-2:]
    slope = (y1 - y0) / (x1 - x0)
    if slope <= 0:
        raise UserError("memory did not grow with the batch: measure with more --rows, or on an idle machine")
    return y0 - slope * x0, slope


def _measured_largest(peak: Callable[[int], int], points: dict[int, int], rows: int, limit: float) -> int:
    """Measure up to TRIES batches, until one is close to the limit; return the most rows that fit.

    peak: measures the peak bytes for a number of rows. points: the peaks measured so far, by number
    of rows; new ones are added. rows: the first number to try. limit: bytes.
    """
    for _ in range(TRIES):
        try:
            points[rows] = peak(rows)
        except torch.cuda.OutOfMemoryError:
            rows = int(rows * LESS)
            continue
        if CLOSE * limit <= points[rows] <= limit:
            break
        fixed, slope = line(points)
        rows = max(int((limit - fixed) // slope), 1)
    return max((found for found, value in points.items() if value <= limit), default=0)


def _peak(name: str, size: Size) -> int:
    if size.device == "cuda":
        return gpu_peak_of(name, Workload(size))
    found = in_own_process(peak_of, name, size, torch.get_num_threads(), preload=PRELOAD)
    assert found is not None  # the peak of an idle process could be measured
    return found


def _idle(threads: int) -> int | None:
    """Return the resident bytes of a process that has only imported modules; None if unknown."""
    torch.set_num_threads(threads)
    return resident_bytes()
