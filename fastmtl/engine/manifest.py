"""manifest.json: what a checkpoint consists of, checked before anything in it is opened.

DeepSpeed's files are pickles, and unpickling runs code. So a file that is not named in the
manifest, or whose size or digest differs,
makes the whole checkpoint refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

NAME = "manifest.json"
FORMAT = 2


class Refused(Exception):
    """Why a directory is not a good checkpoint."""


def write_manifest(directory: Path, about: dict[str, Any]) -> None:
    """Names, sizes and SHA-256 digests of all files below `directory`, beside what `about` says of
    the run.
    """
    files = {str(path.relative_to(directory)): _describe(path) for path in _files(directory)}
    text = json.dumps({"format": FORMAT, **about, "files": files}, indent=1)
    (directory / NAME).write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as it says. Raises Refused with the reason
    otherwise.
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
    digest = hashlib.sha256()  # hashlib.file_digest is Python 3.11's
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
