"""Reading of a data file's bytes and lines, and the suffix that decides its format."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastmtl.errors import UserError

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \r\x0b\x0c"  # not tabs: a line of these is a row of empty cells in a TSV file
_BAD_BYTE = re.compile("[\udc80-\udcff]")


def ending(path: Path) -> str:
    """Return a file's suffix in lower case, without `.gz`: `.csv` for `rows.csv.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_bytes(path: Path) -> bytes:
    """Return the content of a file or pipe, decompressed if its name ends in .gz.

    Raises UserError if the file does not exist, cannot be read or is damaged.
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
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def decoded_lines(content: bytes) -> Iterator[tuple[int, str]]:
    """Yield every line that is not blank: its number (from 1), and its text without the line end.

    Bytes that are not UTF-8 become surrogates in the text; `find_bad_byte` finds them.
    """
    for number, raw in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        line = raw.removesuffix(b"\r")
        if line.strip(_BLANK):
            yield number, line.decode("utf-8", "surrogateescape")


def find_bad_byte(text: str) -> tuple[int, str] | None:
    """Find the first byte of a line that is not UTF-8.

    Return the position of the byte (from 1) and an error message, or None if there is no such byte.
    text: a line from `decoded_lines`.
    """
    found = None if text.isascii() else _BAD_BYTE.search(text)
    if found is None:
        return None
    position = len(text[: found.start()].encode("utf-8")) + 1
    return position, f"expected UTF-8, found byte 0x{ord(found[0]) - 0xDC00:02x}"
