"""Runs of points, each in a process of its own.

A process may run out of memory without harm to the others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastmtl.engine import extension_locks
from fastmtl.errors import UserError

# The fork server imports these once, and skips modules that do not exist. DeepSpeed imports the
# last module, and with it torch's compiler, when it builds an engine.
PRELOAD = ["fastmtl.profile.measure", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a process.

    result: the function's return value; None if it failed. failed: the reason as a sentence; "" for
    success. out_of_memory: True if it failed for lack of memory.
    """

    result: dict[str, Any] | None
    failed: str = ""
    out_of_memory: bool = False


def run(function: Callable[..., dict[str, Any]], *arguments: Any) -> Outcome:
    """Call function(*arguments) in a new process, and return the outcome.

    The arguments must pickle. The process's output is shown only if it fails.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = context.Process(target=_child, args=(theirs, str(log), function, arguments))
        process.start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            answer = None
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
            ours.close()
        if isinstance(answer, Outcome):
            return answer
        return _died(process.exitcode or 0, log)


def _context() -> Any:
    if torch.cuda.is_available():  # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    # A fork server that has only imported modules saves seconds per process.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    extension_locks.release()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _child(
    connection: Connection, log: str, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _be_killed_first()
    try:
        outcome = Outcome(function(*arguments))
    except UserError as error:
        outcome = Outcome(None, str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        outcome = Outcome(None, _first_line(error) or "out of memory", out_of_memory=True)
    connection.send(outcome)
    connection.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: torch's error on a GPU, or its plain RuntimeError on a CPU."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in text or "not enough memory" in text or "Cannot allocate memory" in text
    )


def _died(status: int, log: Path) -> Outcome:
    if status == -signal.SIGKILL:  # by its own watch of the limit, or by Linux, which had no memory left
        return Outcome(None, "needs more memory than there is: its process was killed", out_of_memory=True)
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return Outcome(None, f"its process ended {how}: {lines[-1] if lines else 'no output'}")


def _be_killed_first() -> None:
    """Let the kernel kill this process, and not its parent, when memory runs out."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
