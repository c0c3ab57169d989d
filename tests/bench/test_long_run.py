"""benchmarks/long_run.py on made-up metrics, and on processes that do not train."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "long_run.py"
STEPS = 400
# Instead of the launcher: two ranks that write metrics up to 60 lines or a SIGTERM.
LAUNCHER = """
import os, signal, subprocess, sys, time
if "RANK" not in os.environ:
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": rank}) for rank in "10"]
    sys.exit(max(rank.wait() for rank in ranks))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
run = sys.argv[sys.argv.index("--output") + 1]
os.makedirs(run, exist_ok=True)
path = run + "/metrics.jsonl"
open(path, "a").close()
while not stopped and open(path).read().count("loss") < 60:
    time.sleep(0.05)
    if os.environ["RANK"] == "0":
        with open(path, "a") as file:
            file.write('{"step": 1, "loss": {}}\\n')
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture(scope="module")
def long_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_run", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lines(rate: Callable[[int], float] = lambda step: 500.0) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl; three in a hundred steps are disturbed."""
    return [
        {
            "step": step,
            "loss": {"a": 1.0 / step, "b": 0.5},
            "merged_norm": 2.0,
            "skipped": None,
            "time": 100.0 + step,
            "tokens_per_second": rate(step) if step % 33 else 50.0,
        }
        for step in range(1, STEPS + 1)
    ]


def _samples(
    mib: Callable[[int], float] = lambda step: 1000.0, cpu: Callable[[int], float] = lambda step: 0.8
) -> list[dict[str, Any]]:
    """Return two samples per step for two ranks, the first lower in memory.

    The first steps allocate, and so do evaluation and saving.
    """
    found, spent = [], 10.0
    for step in range(1, STEPS + 1):
        spent += cpu(step)
        most = 5000.0 if step == STEPS else 600.0 if step < 50 else mib(step)
        found += [{"step": step, "rss": [part * most, 900.0], "cpu": [spent, spent]} for part in (0.9, 1.0)]
    return found


def test_a_steady_run_is_not_complained_of(long_run: ModuleType) -> None:
    found, complaints = long_run.memory(_samples(lambda step: 1000.0 + step % 7), STEPS)
    assert not complaints and found["at_50"] == [1003.0, 900.0] and found["peak"] == [1006.0, 900.0]
    assert abs(found["per_1000_steps"][0]) < 5
    for judge in (long_run.losses(_lines(), STEPS), long_run.speed(_lines(), _samples(), STEPS)):
        assert judge[1] == []


def test_growing_memory_is_found(long_run: ModuleType) -> None:
    found, complaints = long_run.memory(_samples(lambda step: 1000.0 + 0.1 * step), STEPS)
    assert found["per_1000_steps"] == [100.0, 0.0]
    assert complaints == ["rank 0's memory has grown from 1007 to 1037 MiB"]


def test_one_high_step_is_no_growth(long_run: ModuleType) -> None:
    found, complaints = long_run.memory(_samples(lambda step: 1300.0 if step == 200 else 1000.0), STEPS)
    assert not complaints and found["peak"][0] == 1300.0


@pytest.mark.parametrize("spoil", [{"loss": {"a": None, "b": 1.0}}, {"merged_norm": None}, {"skipped": "a"}])
def test_a_number_that_is_not_finite_is_found(long_run: ModuleType, spoil: dict[str, Any]) -> None:
    lines = _lines()
    lines[99].update(spoil)
    assert long_run.losses(lines, STEPS)[1] == ["a loss or gradient is not finite at step 100, 1 steps in all"]


def test_a_step_that_is_missing_or_twice_is_found(long_run: ModuleType) -> None:
    lines = _lines()
    assert long_run.losses(lines[:-1], STEPS)[1] == ["399 steps were logged, not 1 to 400"]
    assert long_run.losses([*lines[:10], *lines[9:]], STEPS)[1] == ["401 steps were logged, not 1 to 400"]


def test_falling_throughput_is_found_unless_the_machine_was_busy(long_run: ModuleType) -> None:
    slow = _lines(lambda step: 500.0 if step <= 300 else 400.0)
    found, complaints = long_run.speed(slow, _samples(), STEPS)
    assert not complaints and found["judged_by"] == "cpu_seconds"
    found, complaints = long_run.speed(slow, _samples(cpu=lambda step: 0.8 if step <= 300 else 1.0), STEPS)
    assert found["tokens_per_second"] == [500.0, 500.0, 500.0, 400.0] and len(complaints) == 1


def test_a_resumed_run_that_differs_or_ends_early_is_found(long_run: ModuleType) -> None:
    lines, again = _lines(), _lines(lambda step: 300.0)[:120]
    assert long_run.resumed(lines, again, [61], 120) == (
        {"stopped_at": [61], "equal_steps": 120, "steps": 120},
        [],
    )
    again[80]["merged_norm"] = 2.0000001
    assert long_run.resumed(lines, again, [61], 121)[1] == [
        "the resumed run differs from step 81 on",
        "the resumed run ended at step 120, before 121",
    ]


@pytest.mark.slow
def test_processes_are_seen_stopped_and_started_again(long_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "launcher.py"), "train", "--output", str(tmp_path / "run")]
    watched = long_run.Watched(command, tmp_path / "run")
    watched.go(8)
    assert watched.stops == [watched.steps()] and 8 <= watched.steps() < 60
    watched.go()
    assert watched.steps() == 60 and len(watched.stops) == 1
    steps = [sample["step"] for sample in watched.samples]
    assert steps == sorted(steps) and len(set(steps)) > 5
    assert all(len(sample["rss"]) == len(sample["cpu"]) == 2 and min(sample["rss"]) > 1 for sample in watched.samples)


@pytest.mark.slow
def test_a_run_that_fails_ends_the_script(long_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "launcher.py"), "train", "fail", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="exit status 3: see .*run.log"):
        long_run.Watched(command, tmp_path / "run").go()
