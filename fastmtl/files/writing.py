"""Atomic writes of text files, and write errors of any library as one sentence."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmtl.errors import TrainingError

# torch.save and safetensors raise their own errors instead of OSError; torch's lacks the reason.
_OF_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")
_OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: no reader and no killed process leaves a part of it.

    Devices and pipes are written directly, and a link stays a link. Raises OSError.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Raise TrainingError with `path` and the reason if the block cannot write a file below it.

    advice: a sentence for the user at the end of the message.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(_message(path, error.strerror or str(error), advice)) from error
    except Exception as error:
        number = _OF_SAFETENSORS.search(str(error))
        if number is None and not _OF_TORCH.search(str(error)):
            raise
        reason = os.strerror(int(number[1])) if number is not None else _guess(path)
        raise TrainingError(_message(path, reason, advice)) from error


def _message(path: Path, reason: str, advice: str) -> str:
    return f"cannot write {path}: {reason}. {advice}".strip()


def _guess(path: Path) -> str:
    """Return the likely reason, by the free space of the disk."""
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < 2**20:
        return os.strerror(errno.ENOSPC)
    return (
        f"the file was cut short, as by a limit on file sizes or a quota ({free / 2**20:,.0f} MiB of the disk are free)"
    )
