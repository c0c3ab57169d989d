"""Temporary files for data that are too large for memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from fastmtl.errors import UserError
from fastmtl.files.user_path import cache_instead, cache_path

# The data of a file that stay in memory, in bytes; what exceeds them goes to a temporary file.
IN_MEMORY = 64 << 20
PIECE = 1 << 20

_CACHE: ContextVar[str | Path | None] = ContextVar("cache_dir", default=None)


@contextmanager
def spilling_to(cache_dir: str | Path) -> Iterator[None]:
    """Create the temporary files of the block in `cache_dir` instead of the system's folder.

    The system's folder is often in memory (tmpfs).
    """
    token = _CACHE.set(cache_dir)
    try:
        yield
    finally:
        _CACHE.reset(token)


class Spill:
    """A temporary file without a name, so nothing is left of it after the process ends.

    size: the number of bytes written.
    """

    def __init__(self) -> None:
        file = _unnamed_file()
        self._descriptor = os.dup(file.fileno())
        file.close()
        weakref.finalize(self, os.close, self._descriptor)
        self.size = 0

    def append(self, content: bytes | memoryview) -> None:
        """Write `content` at the end. Raises UserError if the disk is full."""
        rest = memoryview(content)
        while rest:
            try:
                written = os.pwrite(self._descriptor, rest, self.size)
            except OSError as error:
                where = "the folder of temporary files" if _CACHE.get() is None else f"data.cache_dir={_CACHE.get()}"
                raise UserError(f"{where}: cannot write the rows of a large file there: {error.strerror}") from None
            self.size += written
            rest = rest[written:]

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`."""
        parts = []
        while start < stop:
            parts.append(os.pread(self._descriptor, stop - start, start))
            start += len(parts[-1])
            assert parts[-1], "the file ends early"
        return b"".join(parts)

    def pieces(self) -> Iterator[bytes]:
        """Yield the content in pieces of at most PIECE bytes."""
        for start in range(0, self.size, PIECE):
            yield self.read(start, min(start + PIECE, self.size))

    def open(self) -> BinaryIO:
        """Return a file object at the start of the content. Only one may be in use at a time."""
        file = os.fdopen(os.dup(self._descriptor), "rb")
        file.seek(0)
        return file


def _unnamed_file() -> BinaryIO:
    cache_dir = _CACHE.get()
    if cache_dir is None:
        return tempfile.TemporaryFile()
    try:
        folder = cache_path(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        return tempfile.TemporaryFile(dir=cache_instead(cache_dir, str(error.strerror)))
