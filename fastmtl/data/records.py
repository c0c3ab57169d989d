"""Files as records: a header and cells with the line they stand on. CSV, TSV, JSONL and Parquet, UTF-8."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastmtl.errors import UserError, one_line, shortened


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used: its line (Parquet: row number), the column and what was expected there."""

    line: int
    column: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"line {self.line}, column {shortened(self.column)}: {self.reason}")


@dataclass(frozen=True)
class Record:
    line: int
    cells: dict[str, object]


# Called with every bad row: raises, or counts it and returns.
OnBadRow = Callable[[BadRow], None]


def read_records(path: Path, quoted: bool, on_bad_row: OnBadRow) -> tuple[list[str], list[Record]]:
    """All records of a file, by its ending: .jsonl, .parquet, .csv, else tab-separated when the header has a tab.

    Returns the column names (for a repeated or empty name, its index as text is valid too) and the records.
    Raises UserError for a missing, unreadable or empty file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = list(_decoded_lines(content, on_bad_row))
    if not lines:
        raise UserError(f"{path}: the file is empty")
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(lines, on_bad_row)
    return _delimited(path, lines, quoted, on_bad_row)


def _decoded_lines(content: bytes, on_bad_row: OnBadRow) -> Iterator[tuple[int, str]]:
    content = content.removeprefix(b"\xef\xbb\xbf")
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line = raw.removesuffix(b"\r")
        if not line.strip():
            continue
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            on_bad_row(
                BadRow(number, f"byte {error.start + 1}", f"expected UTF-8, found byte 0x{line[error.start]:02x}")
            )


def _delimited(
    path: Path, lines: list[tuple[int, str]], quoted: bool, on_bad_row: OnBadRow
) -> tuple[list[str], list[Record]]:
    delimiter = "," if path.suffix == ".csv" and "\t" not in lines[0][1] else "\t"
    numbers = [number for number, _ in lines]
    reader = csv.reader(
        (text + "\n" for _, text in lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    header: list[str] = []
    records: list[Record] = []
    while True:
        first = reader.line_num  # a quoted cell may span lines: a record is named by its first
        try:
            cells = next(reader)
        except StopIteration:
            return header, records
        except csv.Error as error:
            on_bad_row(BadRow(numbers[min(first, len(numbers) - 1)], "1", f"not readable as CSV: {error}"))
            continue
        line = numbers[first]
        if not header:
            header = [cell.strip() for cell in cells]
        elif len(cells) != len(header):
            where = header[len(cells)] if len(cells) < len(header) else str(len(header) + 1)
            on_bad_row(BadRow(line, where, f"expected {len(header)} columns, found {len(cells)}"))
        else:
            by_index = {str(index): cell for index, cell in enumerate(cells)}
            records.append(Record(line, {**by_index, **dict(zip(header, cells, strict=True))}))


def _jsonl(lines: list[tuple[int, str]], on_bad_row: OnBadRow) -> tuple[list[str], list[Record]]:
    records = []
    header: dict[str, None] = {}
    for number, text in lines:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            on_bad_row(BadRow(number, str(error.colno), f"expected a JSON object: {error.msg}"))
            continue
        if not isinstance(value, dict):
            on_bad_row(BadRow(number, "1", f"expected a JSON object, found {type(value).__name__}"))
            continue
        header.update(dict.fromkeys(value))
        records.append(Record(number, value))
    return list(header), records


def _parquet(path: Path) -> tuple[list[str], list[Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None
    return table.column_names, [Record(number, row) for number, row in enumerate(table.to_pylist(), start=1)]
