"""Removal of lock files that killed processes left where torch builds DeepSpeed's extensions.

torch.utils.cpp_extension builds an extension under a lock file. It waits for another builder's lock
without a time limit or a message. So a run that is killed in its first seconds would make every
later run hang.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

EXTENSIONS = ("cpu_adam", "fused_adam")
# The time that a build may take on another host with the same home folder. This host cannot see
# whether the process of that build is alive.
PATIENCE_SECONDS = 120.0


def release(patience: float = PATIENCE_SECONDS, poll: float = 0.5) -> list[Path]:
    """Remove locks whose builder is gone; return the removed files.

    Removed are locks that no local process holds open and that are `patience` seconds old. The
    function waits for younger locks until their builder releases them or they are old enough, and
    prints a line about that. poll: seconds between two looks at a lock.
    """
    removed = []
    for lock in _locks():
        announced = False
        while (age := _age(lock)) is not None and not _held(lock):
            if age >= patience:
                lock.unlink(missing_ok=True)
                removed.append(lock)
                print(f"{lock}: removed, its builder is gone", flush=True)
                break
            if not announced:
                print(f"{lock}: waiting up to {patience - age:.0f} s for its builder on another host", flush=True)
                announced = True
            time.sleep(poll)
    return removed


def _locks() -> Iterator[Path]:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(chosen or get_default_build_root())
    for name in EXTENSIONS:
        # The default root has a folder for each Python and accelerator.
        yield from root.glob(f"{name}/lock" if chosen else f"*/{name}/lock")


def _age(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _held(lock: Path) -> bool:
    """Return whether a process of this machine has the lock open, as torch does during a build."""
    for process in psutil.process_iter():
        try:
            if any(Path(opened.path) == lock.resolve() for opened in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False
