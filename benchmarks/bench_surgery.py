"""Benchmark of the gradients of a step, by each variant in fastmtl/bench/variants.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from fastmtl.bench.oracle import Oracle
from fastmtl.bench.sizes import Size
from fastmtl.bench.variants import BUILDERS, build
from fastmtl.bench.workload import Workload
from fastmtl.measure.harness import Skipped

Timed = Callable[[Callable[[], object]], None]


@lru_cache(maxsize=1)
def _workload(size: Size) -> tuple[Workload, Oracle]:
    workload = Workload(size)
    return workload, Oracle(workload)


@pytest.mark.parametrize("variant", BUILDERS)
def test_surgery(variant: str, bench_size: Callable[[float], Size], timed: Timed) -> None:
    workload, oracle = _workload(bench_size(0.0))
    try:
        built = build(variant, workload)
        oracle.check(built)
    except Skipped as reason:
        pytest.skip(str(reason))
    timed(built.step)
