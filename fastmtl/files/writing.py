"""Atomic writes of text files, and messages of one sentence for write errors of any library."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastmtl.errors import TrainingError

# torch.save and safetensors raise their own errors instead of OSError; torch's lacks the reason.
_OF_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")
_OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")


def replace_text(path: Path, text: str) -> None:
    """Write text to a file in UTF-8 as `replacing` does."""
    with replacing(path) as file:
        file.write(text)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a file for UTF-8 text that takes the place of the old one at the end of the block.

    A reader sees the old or the new text, never a part, even if the process is killed. After an
    error in the block the old text stays. Devices and pipes are written directly, and a link stays
    a link. Line ends are written as they are. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Turn an error of writing in the block into a TrainingError with `path` and the reason.

    path: the file or folder that the block writes. advice: a sentence for the user at the end of
    the message.
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
    """Return the likely reason of a write error that names none: a full disk or a file limit."""
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < 2**20:
        return os.strerror(errno.ENOSPC)
    return (
        f"the file was cut short, as by a limit on file sizes or a quota ({free / 2**20:,.0f} MiB of the disk are free)"
    )
