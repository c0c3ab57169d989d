"""Run a part in its own process group, which is killed when the part ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, LEFT_OUT, INTERRUPTED = "ok", "failed", "timed out", "left out", "interrupted"
# Exit status of the first part, "environment", if there is no GPU. Then no other part runs.
NO_DEVICE = 3
TAIL_LINES, TAIL_CHARS = 30, 3000


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    state: OK, FAILED, TIMED_OUT or INTERRUPTED. why: the reason; "" for OK. seconds: the time that
    it took. tail: the log's last lines, "" for OK. status: the exit status; None if the process was
    killed at its limit.
    """

    state: str
    why: str
    seconds: float
    tail: str = ""
    status: int | None = None


def run(command: Sequence[str], limit_s: float, log: Path, root: Path) -> Outcome:
    """Run Python with the arguments `command`, log its output, and return the outcome.

    The whole process group is killed after `limit_s` seconds, or when the process ends. root: the
    checkout, where the command runs.
    """
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=environment(root),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also after an interrupt, and for children that outlive the part
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - begun
    if status == 0:
        return Outcome(OK, "", seconds, status=status)
    if status is None:
        return Outcome(TIMED_OUT, f"killed at its limit of {limit_s:.0f} s", seconds, tail_of(log))
    why = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
    return Outcome(FAILED, why, seconds, tail_of(log), status)


def environment(root: Path) -> dict[str, str]:
    """Return the environment variables of the parts.

    Python finds the checkout's packages first, and all parts share one cache of Triton kernels.
    """
    env = dict(os.environ)
    paths = [str(root), str(root / "kernels"), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    env.setdefault("TRITON_CACHE_DIR", str(root / ".cache" / "triton"))
    env.update(PYTHONUNBUFFERED="1", COLUMNS="160")
    return env


def tail_of(log: Path) -> str:
    """Return the last lines of a log, at most TAIL_LINES lines and TAIL_CHARS characters."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARS:]


def read(path: Path) -> dict[str, Any] | None:
    """Return the JSON result that a part wrote; None if the file is missing or unreadable."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found
