"""The files of a checkout, found without git: an exported copy has no .git."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec


def checkout_files(root: Path, folder: Path) -> Iterator[Path]:
    """Yield the files below folder, sorted, that root's .gitignore does not ignore."""
    ignore_file = root / ".gitignore"
    lines = ignore_file.read_text(encoding="utf-8").splitlines() if ignore_file.exists() else []
    ignored = GitIgnoreSpec.from_lines([*lines, "/.git/"])
    for where, folders, names in os.walk(folder):
        above = Path(os.path.relpath(where, root))
        folders[:] = sorted(name for name in folders if not ignored.match_file(f"{(above / name).as_posix()}/"))
        yield from (Path(where, name) for name in sorted(names) if not ignored.match_file((above / name).as_posix()))
