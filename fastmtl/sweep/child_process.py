"""Child processes of `fastmtl`, for commands that make many runs."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from fastmtl.config import Recipe
from fastmtl.engine.recipe_changes import differences

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
FASTMTL = (sys.executable, "-c", "from fastmtl.cli import main; main()")


class Interrupted(Exception):
    """A stop by the user has ended the current run; the runs before it are finished."""


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent ends, also by `kill -9`.

    For `preexec_fn`. Without it the run of a killed sweep would go on, and the next call of the
    sweep could not use its folder. Linux only.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_fastmtl(*arguments: str, command: Sequence[str] = FASTMTL, log: Path | None = None) -> int:
    """Run `fastmtl` with `arguments` in a child process; return its exit status.

    command: the words that start `fastmtl`. log: a file for the command's output, which is
    overwritten; default: the terminal. A stop (SIGTERM, Ctrl-C) is forwarded to the child;
    Interrupted is raised after the child has ended.
    """
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        if process is not None:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with log.open("wb") if log is not None else nullcontext() as file:
            streams: dict[str, Any] = {} if file is None else {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([*command, *arguments], preexec_fn=end_with_parent, **streams)
            while True:
                try:
                    status = process.wait()
                    break
                except KeyboardInterrupt:  # the terminal has sent it to the child as well
                    stopped.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise Interrupted
    return status


def difference(before: Recipe, now: Recipe) -> str | None:
    """Return the first difference of two recipes, like `seed: 1, now 2`; None if there is none."""
    for key, (old, new) in differences(before, now).items():
        if key != "description":
            return f"{key}: {old}, now {new}"
    return None
