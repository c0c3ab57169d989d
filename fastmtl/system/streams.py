"""Standard output and error that never end a run: closed, or in an encoding that lacks most signs."""

from __future__ import annotations

import io
import os
import sys
import threading


def secure() -> None:
    """Make both usable, once, before anything is opened or printed.

    A closed one becomes /dev/null: otherwise the next file that is opened gets its number, and what
    libraries print goes into that file. A sign that the encoding lacks is printed as `?`.
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


def tell_kept_exceptions_once() -> None:
    """Print no traceback of a thread that keeps its exception for its caller, as TensorBoard's
    writer does.
    """
    told = threading.excepthook

    def tell(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is None or getattr(failed.thread, "exception", None) is not failed.exc_value:
            told(failed)

    threading.excepthook = tell
