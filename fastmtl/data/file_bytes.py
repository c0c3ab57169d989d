"""The bytes of a data file, whatever kind of file it is, and the format that its name says."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fastmtl.errors import UserError

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def ending(path: Path) -> str:
    """Return a file's ending in small letters, that of the file inside for a name like `rows.csv.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_bytes(path: Path) -> bytes:
    """Return what a file or pipe holds, decompressed where its name ends in .gz.

    Raises UserError where it does not exist, cannot be read or is damaged.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file")
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.name.lower().endswith(".gz") else content
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or no gzip file: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def decoded_lines(content: bytes, on_bad_bytes: Callable[[int, int, int], None]) -> Iterator[tuple[int, str]]:
    """Yield the lines that hold something: number from 1, and text without its end.

    on_bad_bytes: called for a line that is not UTF-8 with its number, the position of the first bad byte, from 0, and
    that byte; the line is left out.
    """
    for number, raw in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        line = raw.removesuffix(b"\r")
        if not line.strip():
            continue
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            on_bad_bytes(number, error.start, line[error.start])
