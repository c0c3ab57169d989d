"""The commit of the source tree of the running program."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from fastmtl.version import __version__

_ROOT = Path(__file__).parents[2]


def checkout(commit: str | None = None) -> dict[str, Any]:
    """Return {"commit", "clean"}; a value is None if it is unknown.

    clean: True if no file but benchmark results differs from the commit. commit: the output of `git
    describe --always --dirty` for a copy of a checkout without its .git. It is ignored in a
    checkout, which has its own.
    """
    if (_ROOT / ".git").exists():
        git = ["git", "-C", str(_ROOT)]
        head = output_of([*git, "rev-parse", "HEAD"])
        changes = output_of([*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"])
        return {"commit": head, "clean": None if changes is None else not changes}
    if commit is None and not (_ROOT / "pyproject.toml").exists():  # installed from a release
        return {"commit": f"release {__version__}", "clean": True}
    if commit is None:
        return {"commit": None, "clean": None}
    return {"commit": commit.removesuffix("-dirty"), "clean": not commit.endswith("-dirty")}


def output_of(command: list[str]) -> str | None:
    """Run a command; return its output without surrounding spaces, or None if it fails.

    A program that does not exist fails as well.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
