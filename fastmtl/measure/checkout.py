"""The commit of the source tree that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from fastmtl.version import __version__

_ROOT = Path(__file__).parents[2]


def checkout(commit: str | None = None) -> dict[str, Any]:
    """{"commit", "clean"}: the commit, and whether nothing but results differs from it; None where nothing tells.

    commit: as `git describe --always --dirty` gives it, of a copy of a checkout without its .git; a checkout knows its
    own.
    """
    if (_ROOT / ".git").exists():
        git = ["git", "-C", str(_ROOT)]
        head = output_of([*git, "rev-parse", "HEAD"])
        changes = output_of([*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"])
        return {"commit": head, "clean": None if changes is None else not changes}
    if commit is None and not (_ROOT / "pyproject.toml").exists():  # installed, of a release
        return {"commit": f"release {__version__}", "clean": True}
    if commit is None:
        return {"commit": None, "clean": None}
    return {"commit": commit.removesuffix("-dirty"), "clean": not commit.endswith("-dirty")}


def output_of(command: list[str]) -> str | None:
    """What a command prints, without the spaces around it; None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
