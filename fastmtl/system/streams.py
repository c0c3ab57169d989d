"""Standard output and error that never end a run, even if closed or in a limited encoding."""

from __future__ import annotations

import io
import os
import sys
import threading


def secure() -> None:
    """Make standard output and standard error usable.

    Call it once, before anything is opened or printed. A closed stream becomes /dev/null. Otherwise
    the next opened file would get its descriptor, and libraries would print into that file. A
    character outside the encoding is printed as `?`.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def hide_stored_exceptions() -> None:
    """Print no traceback for a thread that stores its exception for another thread.

    TensorBoard's writer is such a thread; the thread that uses the writer raises the exception.
    """
    previous = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is None or getattr(failed.thread, "exception", None) is not failed.exc_value:
            previous(failed)

    threading.excepthook = hook
