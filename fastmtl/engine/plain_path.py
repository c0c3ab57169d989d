"""Paths for DeepSpeed, which finds files with `glob` and so reads `run[1]` as a pattern."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """Yield a path of `directory` that `glob` does not read as a pattern.

    It is `directory` itself, or a temporary link to it if its path contains brackets, `*` or `?`.
    """
    if glob.escape(str(directory)) == str(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="fastmtl-") as folder:
        link = Path(folder) / "directory"
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield link
