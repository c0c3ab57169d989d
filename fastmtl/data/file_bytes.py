"""Reading of a data file's bytes and lines, and the suffix that decides its format."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastmtl.data import spill
from fastmtl.data.spill import PIECE, Spill
from fastmtl.errors import UserError

JSON_LINES, PARQUET, ARROW = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq"), (".arrow",)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \r\x0b\x0c"  # not tabs: a line of these is a row of empty cells in a TSV file
_BAD_BYTE = re.compile("[\udc80-\udcff]")


def ending(path: Path) -> str:
    """Return a file's suffix in lower case, without `.gz`: `.csv` for `rows.csv.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


class Content:
    """The bytes of a file or pipe, decompressed if its name ends in .gz.

    A large file is read in pieces. A large pipe and the decompressed bytes of a large file are kept
    in a temporary file. Raises UserError if the file does not exist, cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = b""
        self._spill: Spill | None = None
        self._plain = False  # read from the file itself
        if path.is_dir():
            raise UserError(f"{path}: a folder, not a file")
        with _errors_named(path):
            with path.open("rb") as file:
                if path.name.lower().endswith(".gz"):
                    with gzip.GzipFile(fileobj=file) as unpacked:
                        self._keep(unpacked)
                elif path.is_file() and os.fstat(file.fileno()).st_size > spill.IN_MEMORY:
                    self._plain = True
                else:
                    self._keep(file)

    def _keep(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._bytes = file.read(spill.IN_MEMORY)
        for piece in iter(partial(file.read, PIECE), b""):
            if self._spill is None:
                self._spill = Spill()
                self._spill.append(self._bytes)
                self._bytes = b""
            self._spill.append(piece)

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes in pieces."""
        if self._plain:
            with _errors_named(self._path), self._path.open("rb") as file:
                yield from iter(partial(file.read, PIECE), b"")
        elif self._spill is not None:
            yield from self._spill.pieces()
        else:
            for start in range(0, len(self._bytes), PIECE):
                yield self._bytes[start : start + PIECE]

    def open(self) -> BinaryIO:
        """Return a file object at the start of the bytes. Only one may be in use at a time."""
        if self._plain:
            return self._path.open("rb")
        return io.BytesIO(self._bytes) if self._spill is None else self._spill.open()

    def first_byte(self) -> bytes:
        """Return the first byte that is not a space or a line end; b"" if there is none."""
        return next((start[:1] for piece in self.pieces() if (start := piece.lstrip())), b"")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield every line that is not blank: its number (from 1), its text without the line end.

        Bytes that are not UTF-8 become surrogates in the text; `find_bad_byte` finds them.
        """
        for number, raw in enumerate(self._raw_lines(), start=1):
            line = (raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw).removesuffix(b"\r")
            if line.strip(_BLANK):
                yield number, line.decode("utf-8", "surrogateescape")

    def _raw_lines(self) -> Iterator[bytes]:
        begun: list[bytes] = []  # the parts of a line that reaches over several pieces
        for piece in self.pieces():
            lines = piece.split(b"\n")
            begun.append(lines[0])
            if len(lines) > 1:
                yield b"".join(begun)
                yield from lines[1:-1]
                begun = [lines[-1]]
        yield b"".join(begun)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Raise the errors of reading a file as UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or no gzip file: {error}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def find_bad_byte(text: str) -> tuple[int, str] | None:
    """Find the first byte of a line that is not UTF-8.

    Return the position of the byte (from 1) and an error message, or None if there is no such byte.
    text: a line from `Content.lines`.
    """
    found = None if text.isascii() else _BAD_BYTE.search(text)
    if found is None:
        return None
    position = len(text[: found.start()].encode("utf-8")) + 1
    return position, f"expected UTF-8, found byte 0x{ord(found[0]) - 0xDC00:02x}"
