"""`fastmtl` commands in processes of their own, for commands that make many runs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from fastmtl.config import Recipe

FASTMTL = (sys.executable, "-c", "from fastmtl.cli import main; main()")


class Interrupted(Exception):
    """A run was stopped; those before it are finished."""


def run_fastmtl(*arguments: str, command: Sequence[str] = FASTMTL, log: Path | None = None) -> int:
    """The exit status of a command. A stop (SIGTERM, Ctrl-C) is passed on and waited for, then Interrupted is raised.

    log: a file that gets what it prints, anew; default: the terminal.
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
            process = subprocess.Popen([*command, *arguments], **streams)
            while True:
                try:
                    status = process.wait()
                    break
                except KeyboardInterrupt:  # the terminal has sent it to the process, too
                    stopped.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise Interrupted
    return status


def difference(before: Recipe, now: Recipe) -> str | None:
    """`data.fraction: 0.5, now 1.0` of the first key that differs."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key) and key != "description":
            return f"{key}: {old.get(key)}, now {new.get(key)}"
    return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return {key: value for part in parts for key, value in part.items()}
