"""`make gpu-check`: run all checks that need a GPU, the most valuable part first.

Each part is a separate process with a time limit, so that an error of one part costs no other. This
process does not import torch. After every part it rewrites RESULTS/<device>.json; logs are in
RESULTS/run. The exit status is 1 if a part failed. A bound that does not hold is printed, and is no
failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from fastmtl.bench.gpu_check import parts, process
from fastmtl.bench.gpu_check.parts import Part, Settings
from fastmtl.bench.gpu_check.process import OK, Outcome
from fastmtl.bench.gpu_check.result import ResultFile

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
DRAW_SECONDS = 30
# Seconds reserved of --seconds for the last figures and the end of this process.
RESERVE_S = 5


class Interrupted(BaseException):
    """Raised on SIGTERM or Ctrl-C. Measurements so far are kept, and the running part is killed."""


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    chosen = _options(arguments)
    run = chosen.results / "run"
    settings = Settings(ROOT, run, chosen.device, chosen.shape, chosen.tokens, chosen.rounds, chosen.commit)
    table = parts.table(settings)
    if chosen.list:
        for part in table:
            print(f"{part.name:32} about {part.expected_s:3} s, at most {part.limit_s:3} s{_needs(part)}")
        return 0
    run.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    wanted = chosen_parts(table, chosen.parts)
    end = None if chosen.seconds is None else begun + chosen.seconds - RESERVE_S
    about = parts.environment(settings)
    try:
        outcome = _run(about, about.limit_s, settings)
    except Interrupted:
        return 1
    if outcome.state != OK:
        print(f"gpu-check: {outcome.tail or outcome.why}", file=sys.stderr)
        if outcome.status == process.NO_DEVICE:
            return 1
    result = ResultFile(chosen.results, process.read(about.result) or {}, extend=bool(chosen.parts))
    if outcome.state != OK:
        result.add(about, outcome)
    pictures = Pictures(result)
    try:
        for part in wanted:
            _part(part, settings, result, end)
            pictures.draw()
    except Interrupted:
        result.failures.append("interrupted: the remaining parts were not run")
    result.failures += pictures.finish()
    result.save()
    return _print_summary(result)


def chosen_parts(table: list[Part], names: list[str]) -> list[Part]:
    """Return the parts that `names` selects, in the order of the table; all if it is empty.

    A name selects the part with this name, or all parts that begin with it: `kernels` selects all
    operations. The process ends with a message if a name selects nothing.
    """
    if not names:
        return table
    wanted: set[str] = set()
    for name in names:
        exact = [part.name for part in table if part.name == name]
        found = exact or [part.name for part in table if part.name.startswith(f"{name}-")]
        if not found:
            sys.exit(f"gpu-check: --parts: there is no part '{name}'; --list shows them")
        wanted.update(found)
    return [part for part in table if part.name in wanted]


def _part(part: Part, settings: Settings, result: ResultFile, end: float | None) -> None:
    """Run a part, or leave it out if time or a module is missing; save and print the outcome."""
    left = float("inf") if end is None else end - time.monotonic()
    missing = part.missing()
    if missing:
        why = f"{sys.executable} has no {', '.join(missing)}"
    elif left < part.expected_s:
        why = f"--seconds leaves {max(left, 0):.0f} s, the part needs about {part.expected_s} s"
    else:
        why = ""
    if why:
        print(f"{part.name}: left out: {why}", flush=True)
        result.leave_out(part, why)
        return
    try:
        outcome = _run(part, min(part.limit_s, left), settings)
    except Interrupted:
        result.add(part, Outcome(process.INTERRUPTED, "interrupted", 0.0))
        raise
    before = {bound["what"] for bound in result.data.get("bounds", [])}
    result.add(part, outcome)
    entry = result.data["parts"][part.name]
    kept = ", its measurements so far are kept" if entry.get("partial") else ""
    print(f"{part.name}: {' '.join(filter(None, [entry['state'], entry['why']]))}, {outcome.seconds:.0f} s{kept}")
    if outcome.tail:
        print(outcome.tail)
    _show_bounds([bound for bound in result.data["bounds"] if bound["what"] not in before])


def _run(part: Part, limit_s: float, settings: Settings) -> Outcome:
    part.result.unlink(missing_ok=True)
    return process.run(part.command, limit_s, settings.run / f"{part.name}.log", settings.root)


class Pictures:
    """A process of low priority that draws the figures during the next part, so no time is lost."""

    def __init__(self, result: ResultFile) -> None:
        self._result = result
        self._process: subprocess.Popen[str] | None = None

    def draw(self) -> None:
        """Start a drawing process, unless the last one still runs."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._begin()

    def finish(self) -> list[str]:
        """Draw all figures once more, and return a line for each figure that failed."""
        if self._process is not None:
            self._wait(self._process)
        return self._wait(self._begin())

    def _begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fastmtl.bench.gpu_check.draw", str(self._result.path), str(self._result.pictures)],
            env=process.environment(ROOT),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: os.nice(10) and None,
        )

    def _wait(self, drawing: subprocess.Popen[str]) -> list[str]:
        try:
            output, _ = drawing.communicate(timeout=DRAW_SECONDS)
        except subprocess.TimeoutExpired:
            drawing.kill()
            drawing.communicate()
            return [f"no figures: drawing took over {DRAW_SECONDS} s"]
        lines = output.strip().splitlines()
        if drawing.returncode:
            return [f"no figures: {lines[-1] if lines else drawing.returncode}"]
        return lines


def _print_summary(result: ResultFile) -> int:
    """Print bounds, parts that were left out, and failures; return the exit status."""
    print()
    _show_bounds(result.data.get("bounds", []))
    for tool, found in result.data.get("compute-sanitizer", {}).items():
        print(f"compute-sanitizer, {tool}: {found}")
    for name, why in result.left_out().items():
        print(f"left out: {name}: {why}")
    print(f"saved in {result.path}", flush=True)
    for failure in result.failures:
        print(f"gpu-check failed: {failure}", file=sys.stderr)
    return 1 if result.failures else 0


def _show_bounds(found: list[dict[str, Any]]) -> None:
    for bound in found:
        verdict = "holds" if bound["holds"] else "DOES NOT HOLD"
        print(f"{bound['what']}: {bound['measured']:.3g}, bound {bound['bound']:.3g}: {verdict}", flush=True)


def _needs(part: Part) -> str:
    return f", needs {', '.join(part.needs)}" if part.needs else ""


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal would lose the result
    raise Interrupted


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--seconds", type=float, help="leave out, by name, the parts that exceed this time")
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="run only these; adds to a kept result")
    parser.add_argument("--list", action="store_true", help="show the parts with their times, and run nothing")
    parser.add_argument("--commit", help="output of git describe --always --dirty, for a copy without .git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: for trying this command")
    parser.add_argument("--shape", default="bert-base", choices=("bert-base", "minilm", "tiny"))
    parser.add_argument("--tokens", type=int, default=parts.TOKENS, help="tokens of a step; 1024 or more")
    parser.add_argument("--rounds", type=int, default=11)
    chosen = parser.parse_args(arguments)
    chosen.results = chosen.results.resolve()
    return chosen


if __name__ == "__main__":
    sys.exit(main())
