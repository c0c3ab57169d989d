"""Fixtures of the benchmarks: one test for each way and pass of the operation OP of a file.

    pytest benchmarks/bench_pool.py                      # MiniLM's size
    pytest benchmarks -k "eager or cpp" --bench-shape bert-base --benchmark-autosave

A way is an implementation of the operation; a pass is forward, backward or both. Inputs, ways,
check and clock are those of `fastmtl bench kernels`; pytest-benchmark repeats, groups, saves and
compares. With --benchmark-disable, and under xdist, everything runs once in a tiny size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastmtl.bench import ops
from fastmtl.bench.kernels import BOTH, forward_and_backward
from fastmtl.bench.laps import Chain, Clock, clock
from fastmtl.bench.ops.case import COMPILED, Case
from fastmtl.bench.sizes import SHAPES, Size
from fastmtl.measure.harness import Skipped, seconds

DROPOUT = 0.1


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmtl benchmarks")
    group.addoption("--bench-shape", default="minilm", choices=list(SHAPES), help="the encoder's size")
    group.addoption("--bench-tokens", type=int, help="tokens of a step; default: the shape's texts")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--bench-precision", default="fp32", choices=("fp32", "bf16"))
    group.addoption("--bench-rounds", type=int, default=7)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" in metafunc.fixturenames:
        # Tiny cases have the same names as the measured ones, which are built later, one by one.
        device = metafunc.config.getoption("--bench-device")
        cases = ops.cases(metafunc.module.OP, Size(ops.TINY, device=device, dropout=DROPOUT))
        last = _tiny(metafunc.config)  # a tiny run does forward and backward for every pass
        passes = {case.name: _passes(case)[-1:] if last else _passes(case) for case in cases}
        names = [(case.name, way.name, link) for case in cases for way in case.ways for link in passes[case.name]]
        metafunc.parametrize("measured", names, indirect=True, ids=["-".join(name) for name in names])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()):
            case, _, link = item.callspec.params["measured"]  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.benchmark(group=f"{case}, {link}", timer=Watch.read))
        elif "timed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=Watch.read))


class Watch:
    """Timer for pytest-benchmark: total seconds that the harness has measured so far."""

    total = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.total


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Check a way against the oracle, and return a function that measures one of its passes."""
    case_name, way, link = request.param
    operation, option = request.module.OP, request.config.getoption
    tiny = _tiny(request.config)
    if tiny and way == COMPILED:
        pytest.skip("torch.compile takes many seconds: skipped unless times are measured")
    size = _size(request.config, DROPOUT)
    case = _cases(operation, size)[case_name]
    try:
        chain = _checked(operation, size, case_name, way)
    except Skipped as reason:
        pytest.skip(str(reason))
    benchmark: BenchmarkFixture = request.getfixturevalue("benchmark")

    def run() -> None:
        if tiny:
            forward_and_backward(chain)
            return
        laps = _clock(size.device).laps(chain)
        Watch.total += sum(laps) if link == BOTH else laps[case.passes.index(link)]

    def measure() -> None:
        if link in case.work:
            benchmark.extra_info.update(case.work[link]._asdict())
        benchmark.extra_info["tokens"] = case.tokens
        benchmark.pedantic(run, rounds=option("--bench-rounds"), warmup_rounds=1)

    return measure


@pytest.fixture
def bench_size(request: pytest.FixtureRequest) -> Callable[[float], Size]:
    """Return a function that returns the size of a step for a dropout probability."""
    return lambda dropout: _size(request.config, dropout)


@pytest.fixture
def timed(request: pytest.FixtureRequest) -> Callable[[Callable[[], object]], None]:
    """Return a function that measures a step as a whole, by fastmtl.measure.harness.seconds."""

    def measure(step: Callable[[], object]) -> None:
        device, rounds = (request.config.getoption(f"--bench-{name}") for name in ("device", "rounds"))

        def run() -> None:
            Watch.total += seconds(step, torch.device(device))

        request.getfixturevalue("benchmark").pedantic(run, rounds=rounds, warmup_rounds=1)

    return measure


def _size(config: pytest.Config, dropout: float) -> Size:
    option, tiny = config.getoption, _tiny(config)
    shape = ops.TINY if tiny else SHAPES[option("--bench-shape")]
    tokens = None if tiny else option("--bench-tokens")
    return Size(shape, 3, tokens, option("--bench-device"), option("--bench-precision"), dropout)


def _tiny(config: pytest.Config) -> bool:
    """Return True if nothing is measured: with --benchmark-disable, or in a worker of xdist."""
    return bool(config.getoption("benchmark_disable")) or hasattr(config, "workerinput")


def _passes(case: Case) -> tuple[str, ...]:
    return (*case.passes, BOTH) if len(case.passes) > 1 else case.passes


@lru_cache(maxsize=1)
def _cases(operation: str, size: Size) -> dict[str, Case]:
    return {case.name: case for case in ops.cases(operation, size)}


@lru_cache(maxsize=1)
def _checked(operation: str, size: Size, case_name: str, way_name: str) -> Chain:
    """Return forward and backward of a way, after a check against the oracle and one run."""
    case = _cases(operation, size)[case_name]
    way = case.way(way_name)
    run = way.build()
    case.check(way, run)
    chain, _ = case.chain(way, run)
    forward_and_backward(chain)
    return chain


@lru_cache(maxsize=1)
def _clock(device: str) -> Clock:
    return clock(torch.device(device))
