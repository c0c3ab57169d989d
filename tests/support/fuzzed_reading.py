"""The readers on random files: no exception but a one-line UserError with the file's name.

Every row must be accounted for.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
from fuzzed_files import Case, draw_case

from fastmtl.data import columnar, file_bytes, spill
from fastmtl.data.readers import read_file
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECES = [
    b'"',
    b"\x00",
    b"\r",
    b"\n",
    b"\t",
    b",",
    b"\xff",
    BYTE_ORDER_MARK,
    b"{",
    b"}",
    b"[" * 2000,
    b"\\ud800",
    b"1e999",
]


class Fault(AssertionError):
    """Raised for a reader's fault."""


def fuzz(seed: int, inputs: int, folder: Path) -> Counter[str]:
    """Read `inputs` random files, each with and without bad rows skipped; return the counts.

    Raises Fault, with the seed of the file.
    """
    counts: Counter[str] = Counter()
    for number in range(inputs):
        name = f"{seed}-{number}"
        try:
            counts += check(case_of(name), folder)
        except Exception as error:
            raise Fault(f"file {name} (kept in {folder}): {type(error).__name__}: {error}") from error
    return counts


def case_of(name: str) -> Case:
    """Return the file of a name, always the same: two of three unchanged, others damaged."""
    random = Random(name)
    case = draw_case(random)
    return case if random.random() < 2 / 3 else damaged(case, random)


def damaged(case: Case, random: Random) -> Case:
    """Return the file with bytes changed, removed, doubled or inserted."""
    content = bytearray(case.content)
    for _ in range(random.randint(1, 6)):
        at = random.randrange(len(content) + 1)
        match random.randrange(5):
            case 0:
                content[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                content[at:at] = random.choice(PIECES)
            case 2:
                del content[at : at + random.randint(1, 20)]
            case 3:
                content[at:at] = content[at : at + random.randint(1, 200)]
            case _ if random.random() < 0.2:
                del content[at:]
    case.content, case.rows, case.refused = bytes(content), None, None
    return case


def check(case: Case, folder: Path) -> Counter[str]:
    path = folder / case.name
    path.write_bytes(case.content)
    counts = Counter({"files": 1})
    rows = _read(path, case, "skip")
    counts["files refused"] += rows is None
    good = [row for row in case.rows or [] if row.outcome == "good"]
    if rows is None:
        _require(case.refused is not False or not good, "a file with good rows was refused")
    else:
        _require(case.refused is not True, "a file that is unreadable was taken")
        counts["rows"] += len(rows)
        counts["bad rows reported"] += len(rows.skipped)
        _check_rows(case, rows)
    _check_pieces(path, case, rows)
    strict = _read(path, case, "error")
    if rows is not None:
        _require((strict is None) == bool(rows.skipped), "bad rows are an error, and nothing else is")
    path.unlink()
    return counts


def _read(path: Path, case: Case, on_bad_row: str) -> Rows | None:
    try:
        return read_file(path, case.task, on_bad_row=on_bad_row, require_labels=case.require_labels)  # type: ignore[arg-type]
    except UserError as error:
        message = str(error)
        _require(len(error.lines) == 1 and message.isprintable(), f"no message of one line: {message!r}")
        _require(message.startswith(str(path)), f"the message does not begin with the file: {message}")
        bad = [row for row in case.rows or [] if row.outcome != "good"]
        if on_bad_row == "error" and case.refused is False and bad:
            _require(any(f"line {row.line}," in message for row in bad), f"the message names no bad row: {message}")
        return None


def _check_rows(case: Case, rows: Rows) -> None:
    """Check that input rows are output or reported, and that each equals the written one."""
    lines = _rows_in(case)
    if lines is not None:
        found = f"{len(rows)} rows and {len(rows.skipped)} reported ones"
        _require(len(rows) + len(rows.skipped) == lines, f"{found} of {lines}")
    if case.rows is None:
        return
    reported = Counter(bad.line for bad in rows.skipped)
    _require(not reported or max(reported.values()) == 1, f"a line was reported twice: {rows.skipped}")
    starts = {row.line for row in case.rows}
    _require(reported.keys() <= starts, f"reported lines where no row begins: {sorted(reported.keys() - starts)}")
    for row in case.rows:
        _require(row.outcome != "bad" or row.line in reported, f"line {row.line} was taken though bad: {row.why}")
        _require(row.outcome != "good" or row.line not in reported, f"line {row.line} is good: {rows.skipped}")
    kept = [row for row in case.rows if row.line not in reported]
    _require(rows.texts == [row.text for row in kept], f"texts: {rows.texts}, written: {[row.text for row in kept]}")
    if case.require_labels:
        assert rows.labels is not None
        written = np.array([row.label for row in kept], dtype=rows.labels.dtype)
        _require(np.array_equal(rows.labels, written), f"labels {rows.labels.tolist()}, written {written.tolist()}")


def _check_pieces(path: Path, case: Case, rows: Rows | None) -> None:
    """Check that a file too large for memory, which is read in small pieces, has the same rows."""
    limits = [(spill, "IN_MEMORY", 40), (spill, "PIECE", 7), (file_bytes, "PIECE", 7), (columnar, "BATCH", 2)]
    with ExitStack() as patches:
        for module, name, value in limits:
            patches.enter_context(mock.patch.object(module, name, value))
        pieces = _read(path, case, "skip")
    _require((pieces is None) == (rows is None), "a file is refused either in pieces or as a whole")
    if rows is None or pieces is None:
        return
    for name in ("ids", "texts", "pair_texts", "skipped", "notes"):
        one, other = getattr(rows, name), getattr(pieces, name)
        _require(one == (None if other is None else list(other)), f"{name} in pieces: {other}, as a whole: {one}")
    _require(np.array_equal(np.array(rows.labels), np.array(pieces.labels)), "labels in pieces are not those")


def _rows_in(case: Case) -> int | None:
    """Return the number of lines with a row, from the bytes; None if quotes may join lines."""
    if case.lines is None:
        return None
    content = case.content
    if case.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return None
    lines = [line for line in content.removeprefix(BYTE_ORDER_MARK).split(b"\n") if line.strip()]
    if not lines:
        return None
    if case.has_tabs:  # a row of empty cells
        lines = [line for line in content.removeprefix(BYTE_ORDER_MARK).split(b"\n") if line.strip(b" \r\x0b\x0c")]
    return len(lines) - case.header


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise Fault(fault)
