"""The memory of a process that trains on a CPU. With a malloc that is not glibc's nothing here does anything.

Left alone, glibc's malloc keeps freed blocks of up to 32 MiB in a heap, to be used again. Holes grow in it as blocks of
other sizes come: in training, where sizes change from batch to batch, 10 to 25 % of a step's peak. What is larger it
maps anew each time, in pages of 4 KiB with a page fault each: half of a MiniLM step's processor time on virtual cores.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 1 << 20
_MAPPED = 4 << 20
_MAPPED_ONCE = 128 << 10
_TOP = 4 << 20  # what may stay free at the heap's end; without it glibc would keep twice the largest block so far
_HUGE_PAGE = 2 << 20
# oneDNN keeps code for each shape that it has seen, by default of 1,024. GELU alone has two a batch: 6 MiB after 300
# batches of different lengths, in small blocks all over the heap. These are three steps of its bfloat16.
_PRIMITIVES = 64
_maps = False  # a setting of the process, as malloc's are


def map_large_blocks() -> bool:
    """Blocks of 4 MiB and more are mapped, tensors in huge pages, and go back to the system when they are freed.

    oneDNN keeps fewer of its primitives, too. To be called before the process makes its first tensor: torch and oneDNN
    look but once. False where Linux gives no huge pages (then nothing is mapped: small pages would cost more than is
    won), or where the user has chosen by MALLOC_* or GLIBC_TUNABLES; who sets torch's THP_MEM_ALLOC_ENABLE=0 gets none.
    """
    global _maps
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_PRIMITIVES))
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not _gets_huge_pages():
        return False
    mallopt(_M_TRIM_THRESHOLD, _TOP)
    mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    _maps = True
    return True


@contextmanager
def seldom() -> Iterator[None]:
    """For what is done now and then, with blocks of other sizes than a step's: where large blocks are mapped, those of
    128 KiB are too meanwhile, and leave no holes behind.
    """
    if not _maps:
        yield
        return
    mallopt = _function("mallopt")
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_ONCE)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def free_at_once() -> None:
    """Large blocks of this process go back to the system when they are freed. Costs time; for measuring."""
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """What is free now goes back to the system."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _gets_huge_pages() -> bool:
    before = _huge_bytes()
    block = torch.ones(4 * _HUGE_PAGE, dtype=torch.uint8)
    return _huge_bytes() - before >= _HUGE_PAGE and len(block) > 0


def _huge_bytes() -> int:
    """Of this process now; 0 where the system does not tell."""
    try:
        found = re.search(r"^AnonHugePages:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if platform.libc_ver()[0] == "glibc" else None
