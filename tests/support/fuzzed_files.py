"""Random data files, each with the expected outcome of every row.

A file is a task with its rows (fuzzed_rows.py) and a way to write them: CSV, TSV, JSON lines or
Parquet, quotes, line ends, a byte order mark, gzip.
"""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
from fuzzed_rows import Draw, Row
from parquet_columns import draw_column

from fastmtl.config import TaskConfig


@dataclass
class Case:
    """A file and its task.

    rows: None if they are unknown. refused: whether the whole file must (True), may (None) or must
    not be refused (False), apart from its bad rows.
    """

    name: str
    content: bytes
    task: TaskConfig
    require_labels: bool
    rows: list[Row] | None
    refused: bool | None = False
    # Non-empty lines after the header, if each is a row: no cell can contain a line end.
    lines: int | None = None
    header: bool = True
    has_tabs: bool = False


def draw_case(random: Random) -> Case:
    """Draw a file with known rows."""
    draw = Draw(random)
    number = random.randint(4, 12) if random.random() < 0.8 else 1
    rows = [draw.row(index, number) for index in range(number)]
    write = {"jsonl": _json_lines, "parquet": _parquet}.get(draw.style, _delimited)
    return write(draw, rows)


def _finish(
    draw: Draw, content: bytes, rows: list[Row], ending: str, *, refused: bool | None, lines: int | None
) -> Case:
    random = draw.random
    if draw.style != "parquet" and random.random() < 0.2:
        content = b"\xef\xbb\xbf" + content
    name = f"{random.choice(['rows', 'my rows', 'réponses', 'a.b'])}.{ending}"
    name = name.upper() if random.random() < 0.2 else name
    if random.random() < 0.15:
        name, content = name + ".gz", gzip.compress(content, mtime=0)
    if random.random() < 0.05 and not name.endswith(".gz"):
        content = content.decode("utf-8", "replace").encode("utf-16") if draw.style != "parquet" else content[:-3]
        rows, refused, lines = [], True, None
    header = draw.delimited and draw.header
    return Case(name, content, draw.task, draw.require_labels, rows, refused, lines, header, draw.delimiter == "\t")


def _delimited(draw: Draw, rows: list[Row]) -> Case:
    random, delimiter = draw.random, draw.delimiter
    end = random.choice(["\n", "\n", "\r\n"])
    always = random.random() < 0.3

    def cell(value: Any) -> str:
        text = str(value)
        if not draw.quoted:
            return text.replace(delimiter, " ").replace("\n", " ")
        quote = always or any(sign in text for sign in (delimiter, '"', "\n", "\r"))
        return '"' + text.replace('"', '""') + '"' if quote else text

    encoded, line = [], 1
    if draw.header:
        encoded.append(delimiter.join(map(cell, draw.order)).encode())
        line += 1
    unclosed = random.randrange(len(rows)) if draw.quoted and random.random() < 0.25 else None
    for number, row in enumerate(rows):
        if random.random() < 0.05:
            encoded.append(random.choice([b"", b"  ", b"\x0c"]))  # a blank line is no row
            line += 1
        written = [cell(row.values[column]) for column in draw.order]
        if number == unclosed:
            written = _with_open_quote(draw, row)
        elif random.random() < 0.06 and (draw.header or number):  # the first line gives the number of columns
            less = written[:-1] if "".join(written[:-1]).strip() else [*written, "x", "y"]
            written, row.outcome, row.why = random.choice([less, [*written, "x"]]), "bad", "ragged"
        raw = delimiter.join(written).encode()
        if random.random() < 0.04 and not (line == 1 or number == unclosed):
            raw, row.outcome, row.why = _bad_bytes(raw, random), "bad", "bytes"
        row.line = line
        line += raw.count(b"\n") + 1
        encoded.append(raw)
    content = end.encode().join(encoded) + (end.encode() if random.random() < 0.8 else b"")
    # A cell in CSV quotes without declared quoting: the whole file is refused.
    undecided = not draw.quoted and draw.quotes_setting is None
    cells = [
        str(row.values[draw.roles[role]]).strip()
        for row in rows
        for role in ("text", "text_pair")
        if role in draw.roles
    ]
    may = undecided and any(cell[:1] == '"' and cell[-1:] == '"' and '""' in cell[1:-1] for cell in cells)
    first_is_row = not draw.header and rows[0].outcome != "good"
    several_lines = not draw.header and b"\n" in encoded[0]
    ending = (
        "tsv" if draw.style == "tsv" or (delimiter == "\t" and several_lines) else random.choice(["csv", "csv", "txt"])
    )
    refused = None if may or first_is_row else False
    lines = None if draw.quoted else len(rows)
    return _finish(draw, content, rows, ending, refused=refused, lines=lines)


def _with_open_quote(draw: Draw, row: Row) -> list[str]:
    """Return the cells of one line whose text begins with a quote that is never closed."""
    written = [str(row.values[column]).replace(draw.delimiter, ";").replace('"', "'") for column in draw.order]
    written = [" ".join(cell.split("\n")).replace("\r", " ") for cell in written]
    label, _ = draw.label()
    written[draw.order.index(draw.roles["label"])] = str(label if '"' not in str(label) else 0).replace(
        draw.delimiter, ";"
    )
    written[draw.order.index(draw.roles["text"])] = '"never closed'
    row.outcome, row.why = "bad", "open quote"
    return written


def _bad_bytes(raw: bytes, random: Random) -> bytes:
    """Return the line with bytes that are not UTF-8: Latin-1, a cut character, a surrogate."""
    at = random.randrange(len(raw) + 1)
    while at < len(raw) and 0x80 <= raw[at] < 0xC0:  # not inside a character
        at += 1
    return (
        raw[:at].replace(b"\n", b" ")
        + random.choice([b"\xe9", b"\xf0\x9f", b"\xed\xa0\xbd", b"\xff"])
        + raw[at:].replace(b"\n", b" ")
    )


def _json_lines(draw: Draw, rows: list[Row]) -> Case:
    random = draw.random
    end, ascii_only = random.choice(["\n", "\r\n"]), random.random() < 0.5
    encoded: list[bytes] = []
    for row in rows:
        if random.random() < 0.05:
            encoded.append(random.choice([b"", b" ", b"\t"]))
        raw = json.dumps(row.values, ensure_ascii=ascii_only).encode()
        if random.random() < 0.2:
            raw, row.why = random.choice(_BAD_JSON)(row, random, raw), "json"
            row.outcome = "bad"
        row.line = len(encoded) + 1
        encoded.append(raw)
    content = end.encode().join(encoded) + (b"\n" if random.random() < 0.8 else b"")
    # Keys of bad lines are not columns, so a file of bad lines alone may lack all columns.
    refused = None if any(row.why == "json" for row in rows) else False
    ending = random.choice(["jsonl", "ndjson", "json"])
    return _finish(draw, content, rows, ending, refused=refused, lines=len(rows))


def _with(key: str, value: Any) -> Any:
    return lambda row, random, raw: json.dumps({**row.values, key: value}).encode()


_BAD_JSON: list[Any] = [
    _with("text", "half \ud83d"),
    _with("text", ["a", "list"]),
    _with("text", {"an": "object"}),
    _with("text", None),
    _with("text", float("nan")),
    lambda row, random, raw: json.dumps({key: value for key, value in row.values.items() if key != "text"}).encode(),
    lambda row, random, raw: raw[: random.randrange(1, len(raw))],
    lambda row, random, raw: raw[:-1] + b', "text": "twice"}',
    lambda row, random, raw: b'{"text": ' + b"[" * 100_000,
    lambda row, random, raw: b'{"text": ' + b"9" * 5000 + b"}",
    lambda row, random, raw: random.choice([b"[1, 2]", b'"text"', b"null", b"7", b"NaN"]),
    lambda row, random, raw: _bad_bytes(raw, random),
]


def _parquet(draw: Draw, rows: list[Row]) -> Case:
    random, table = draw.random, {}
    if random.random() < 0.5:
        for row in rows:
            row.values[draw.roles["label"]] = str(row.values[draw.roles["label"]])
    for column in dict.fromkeys(draw.order):
        values = [row.values[column] for row in rows]
        if len({type(value) for value in values}) > 1:
            values = [str(value) for value in values]
        table[column] = pyarrow.array(values)
        if table[column].type == pyarrow.string() and random.random() < 0.5:
            table[column] = (
                table[column].cast(pyarrow.large_string())
                if random.random() < 0.5
                else table[column].dictionary_encode()
            )
    if random.random() < 0.3:
        array, texts = draw_column(random, len(rows))
        table[draw.roles["text"]] = array
        for row, text in zip(rows, texts, strict=True):
            if text is None:
                row.outcome, row.why = "bad", f"text of type {array.type}"
            elif row.why == "no text" and (not draw.has_pair or str(row.values[draw.roles["text_pair"]]).strip()):
                row.outcome = "good"
            row.text = text or ""
    for number, row in enumerate(rows, start=1):
        row.line = number
    buffer = io.BytesIO()
    options = {"compression": random.choice(["none", "snappy", "zstd"]), "row_group_size": random.choice([1, 3, None])}
    pyarrow.parquet.write_table(pyarrow.table(table), buffer, **options)
    return _finish(draw, buffer.getvalue(), rows, random.choice(["parquet", "pq"]), refused=False, lines=None)
