"""Paths that may begin with `~`, also on machines without a home directory."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

from fastmtl.errors import UserError, one_line


def user_path(path: str | Path) -> Path:
    """Return the path with `~` expanded.

    Raises UserError if the user has no home directory, and for a path with a null character.
    """
    if "\0" in str(path):
        raise UserError(f"{path}: a path cannot hold the character 0")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: this user has no home directory for ~ to mean; give the whole path") from None


@functools.cache
def cache_path(path: str | Path) -> Path:
    """Return a cache folder with `~` expanded.

    Without a home directory the result is a new temporary folder, and a line on standard error says
    so. Raises UserError for a path with a null character.
    """
    if "\0" in str(path):
        raise UserError(f"data.cache_dir: {path}: a path cannot hold the character 0")
    try:
        return user_path(path)
    except UserError:
        folder = Path(tempfile.mkdtemp(prefix="fastmtl-"))
        note = one_line(f"fastmtl: data.cache_dir={path}: this user has no home directory; using {folder}")
        print(note, file=sys.stderr)
        return folder


@functools.cache
def cache_instead(cache_dir: str | Path, why: str) -> Path:
    """Return a temporary folder that replaces the cache, and print a warning.

    why: the reason, for the warning. The result is cached: one folder and one warning per process.
    """
    folder = Path(tempfile.mkdtemp(prefix="fastmtl-"))
    print(one_line(f"fastmtl: data.cache_dir={cache_dir} is not writable ({why}); using {folder}"), file=sys.stderr)
    return folder
