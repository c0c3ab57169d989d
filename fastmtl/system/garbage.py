"""Imports without garbage collections."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Collect no garbage inside the context, for imports; later collections skip their objects.

    torch, DeepSpeed and transformers make millions of objects that stay. Each full collection would
    look at all of them again, which takes a fifth of a short run's processor time.
    """
    enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if enabled:
            gc.enable()
