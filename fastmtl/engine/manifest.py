"""manifest.json: the list of a checkpoint's files, checked before any of them is opened.

DeepSpeed's files are pickles, and unpickling runs code. So a checkpoint is rejected if it has a
file that is not in the manifest, or one with another size or digest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

NAME = "manifest.json"
FORMAT = 2


class Refused(Exception):
    """An error whose message is the reason why a directory is not a valid checkpoint."""


def write_manifest(directory: Path, about: dict[str, Any]) -> None:
    """Write manifest.json with name, size and SHA-256 digest of every file below `directory`.

    about: more keys of the manifest, JSON values.
    """
    files = {str(path.relative_to(directory)): _describe(path) for path in _files(directory)}
    text = json.dumps({"format": FORMAT, **about, "files": files}, indent=1)
    (directory / NAME).write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking all its files.

    Raises Refused with the reason if the manifest cannot be read, or if a file is missing,
    additional or changed.
    """
    try:
        manifest = json.loads((directory / NAME).read_text(encoding="utf-8"))
        files = manifest["files"]
        known = manifest["format"] == FORMAT and isinstance(files, dict)
    except FileNotFoundError:
        raise Refused(f"it has no {NAME}: not a checkpoint of fastmtl, or one that was never finished") from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        raise Refused(f"its {NAME} cannot be read") from None
    if not known:
        raise Refused(f"its {NAME} has another format than {FORMAT}: it was saved by another version of fastmtl")
    there = {str(path.relative_to(directory)) for path in _files(directory)}
    missing, extra = sorted(set(files) - there), sorted(there - set(files))
    if missing:
        raise Refused(f"its file {missing[0]} is missing")
    if extra:
        raise Refused(f"it holds a file that it was not saved with: {extra[0]}")
    for name, expected in files.items():
        path = directory / name
        if path.is_symlink():
            raise Refused(f"its file {name} is a link")
        if path.stat().st_size != expected["size"]:
            raise Refused(f"its file {name} has {path.stat().st_size} bytes instead of {expected['size']}")
        if _describe(path)["sha256"] != expected["sha256"]:
            raise Refused(f"its file {name} was changed after it was saved")
    return manifest


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if not path.is_dir() and path.name != NAME)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": _sha256(stream)}


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
