"""Lock files that a killed process left in the folder where torch builds DeepSpeed's extensions.

torch.utils.cpp_extension builds an extension under a lock file and waits for another builder's for
ever, in silence: a run stopped in its first seconds would hang every later one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

EXTENSIONS = ("cpu_adam", "fused_adam")
# A builder on another host with the same home folder cannot be seen from here: it gets this long.
PATIENCE_SECONDS = 120.0


def release(patience: float = PATIENCE_SECONDS, poll: float = 0.5) -> list[Path]:
    """Removes the locks that no process here holds open once they are `patience` seconds old;
    returns them.

    Waits for younger ones until their builder releases them or they are old enough, and says so.
    """
    removed = []
    for lock in _locks():
        told = False
        while (age := _age(lock)) is not None and not _held(lock):
            if age >= patience:
                lock.unlink(missing_ok=True)
                removed.append(lock)
                print(f"{lock}: removed, its builder is gone", flush=True)
                break
            if not told:
                print(f"{lock}: waiting up to {patience - age:.0f} s for its builder on another host", flush=True)
                told = True
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
    """Whether a process of this machine has it open, as torch does while it builds."""
    for process in psutil.process_iter():
        try:
            if any(Path(opened.path) == lock.resolve() for opened in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False
