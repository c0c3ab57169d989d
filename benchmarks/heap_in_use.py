r"""Malloc's used and free memory, and the resident memory, during a training run on a CPU.

    python benchmarks/heap_in_use.py train cs224n data.dir=DIR train.max_steps=700 \
        train.epochs=100 --output runs/heap

The arguments are those of `fastmtl`; the run must have one process. The script prints a line after
every 50 steps, right after the heap was trimmed, and so shows if used memory grows. Needs glibc.
"""

from __future__ import annotations

from collections.abc import Callable

from fastmtl.cli import main
from fastmtl.measure import heap
from fastmtl.measure.harness import MIB, heap_bytes, resident_bytes

EVERY = 50


def printing(trim: Callable[[], None]) -> Callable[[], None]:
    steps = 0

    def trim_and_print() -> None:
        nonlocal steps
        trim()
        steps += 1
        if steps % EVERY == 0:
            used, free, mapped, resident = (f"{size / MIB:.1f}" for size in (*heap_bytes(), resident_bytes() or 0))
            print(f"step {steps}: {used} MiB in use, {free} free, {mapped} mapped; {resident} resident", flush=True)

    return trim_and_print


if __name__ == "__main__":
    heap.trim = printing(heap.trim)
    main()
