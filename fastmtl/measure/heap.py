"""Settings of malloc for a process that trains on a CPU. They apply to glibc's malloc only.

By default glibc's malloc keeps freed blocks of up to 32 MiB in a heap for reuse. Blocks of
different sizes leave holes in the heap. In training, where sizes change from batch to batch, the
holes take 10 to 25 % of a step's peak. malloc maps each larger block anew, in pages of 4 KiB with a
page fault each, which takes half of a MiniLM step's processor time on virtual cores.
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
_TOP = 4 << 20  # bytes that may stay free at the heap's end; glibc's default is twice the largest block so far
_HUGE_PAGE = 2 << 20
# oneDNN caches a primitive, which is compiled code, for each operation and shape, 1,024 by default.
# GELU alone adds two per batch: 6 MiB after 300 batches of different lengths, in small blocks all
# over the heap. With this limit the cache holds the primitives of three bfloat16 steps.
_PRIMITIVES = 64
_maps = False  # True once large blocks are mapped; malloc's settings hold for the whole process


def map_large_blocks() -> bool:
    """Make malloc map each block of 4 MiB and more, so that a freed block returns to the system.

    Tensors get huge pages, and oneDNN caches fewer primitives. Call this before the process makes
    its first tensor, as torch and oneDNN read their settings once. Return False, and map nothing,
    if Linux gives no huge pages (small pages would cost more than is gained) or if the user has set
    MALLOC_* or GLIBC_TUNABLES. The user's THP_MEM_ALLOC_ENABLE=0 is kept.
    """
    global _maps
    if _maps:
        return True
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
def mapping_small_blocks() -> Iterator[None]:
    """Map blocks of 128 KiB and more inside the context, for rare work of unusual sizes.

    Such blocks then leave no holes in the heap. Without map_large_blocks, this does nothing.
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
    """Make malloc return blocks of 1 MiB and more to the system as soon as they are freed.

    This is slow, and meant for measurements of memory.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """Return the heap's free memory to the system."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _gets_huge_pages() -> bool:
    before = _huge_bytes()
    block = torch.ones(4 * _HUGE_PAGE, dtype=torch.uint8)
    return _huge_bytes() - before >= _HUGE_PAGE and len(block) > 0


def _huge_bytes() -> int:
    """Return the bytes of this process in huge pages; 0 if unknown."""
    try:
        found = re.search(r"^AnonHugePages:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if platform.libc_ver()[0] == "glibc" else None
