"""Benchmark of a whole training step, in each way that fastmtl/bench/step_ways.py defines."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from fastmtl.bench.sizes import Size
from fastmtl.bench.step import DROPOUT, checked, padded_losses
from fastmtl.bench.step_ways import DEFAULT
from fastmtl.bench.workload import Workload
from fastmtl.measure.harness import Skipped

Timed = Callable[[Callable[[], object]], None]


_workload = lru_cache(maxsize=1)(Workload)


@pytest.mark.parametrize("way", DEFAULT)
def test_step(way: str, bench_size: Callable[[float], Size], timed: Timed) -> None:
    workload = _workload(bench_size(DROPOUT))
    try:
        # Each way is compared with the padded model anew, since the previous way has changed the
        # weights that both models share.
        step, _ = checked(way, workload, padded_losses(workload, workload.padded))
    except Skipped as reason:
        pytest.skip(str(reason))
    timed(step)
