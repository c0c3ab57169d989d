"""The files of a git checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def git_files(folder: Path) -> list[Path]:
    """Return the files of folder that git tracks or would add, sorted, as paths below folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git cannot list the files of {folder}: {done.stderr.strip()}")
    return [path for name in sorted(done.stdout.split("\0")) if name and (path := folder / name).is_file()]
