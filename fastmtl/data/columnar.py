"""Parquet and Arrow files as tables, and the names of classes that Hugging Face puts into them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmtl.data.file_bytes import ARROW, PARQUET, Content, ending
from fastmtl.data.places import Batch, Table
from fastmtl.errors import UserError

BATCH = 8192  # rows that are read at once
_FILE_FORMAT = b"ARROW1"  # the first bytes of Arrow's file format; its stream format has none


def is_columnar(path: Path) -> bool:
    return ending(path) in (*PARQUET, *ARROW)


def open_columnar(path: Path) -> Table:
    """Open a Parquet or Arrow file.

    Raises UserError for a missing, damaged or empty file, also while its rows are read.
    """
    kind = "Parquet" if ending(path) in PARQUET else "Arrow"
    if not path.exists():
        raise UserError(f"{path}: no such file")
    content = Content(path)

    @contextmanager
    def opened() -> Iterator[tuple[Any, Iterator[Any]]]:
        """Yield the file's schema and its record batches."""
        import pyarrow

        try:
            with content.open() as file:
                yield (_parquet if kind == "Parquet" else _arrow)(file)
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a readable {kind} file: {error}") from None

    def batches() -> Iterator[Batch]:
        with opened() as (_, found):
            for batch in found:
                for start in range(0, batch.num_rows, BATCH):
                    yield named(batch.slice(start, BATCH).to_pylist(), classes)

    with opened() as (schema, found):
        header, classes = schema.names, class_names(schema)
        if not header or not any(batch.num_rows for batch in found):
            raise UserError(f"{path}: no rows")
    return Table(str(path), header, batches, classes)


def _parquet(file: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(file, "r"))
    return opened.schema_arrow, opened.iter_batches(BATCH)


def _arrow(file: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow

    beginning = file.read(len(_FILE_FORMAT))
    file.seek(0)
    if beginning == _FILE_FORMAT:
        opened = pyarrow.ipc.open_file(pyarrow.PythonFile(file, "r"))
        return opened.schema, (opened.get_batch(index) for index in range(opened.num_record_batches))
    stream = pyarrow.ipc.open_stream(pyarrow.PythonFile(file, "r"))
    return stream.schema, iter(stream)


def class_names(schema: Any) -> dict[str, list[str]]:
    """Return {column: names of its classes} of the columns whose cells are numbers of classes.

    They are columns of Hugging Face's ClassLabel, or of lists of it.
    schema: a pyarrow.Schema with the metadata of the package `datasets`, or without.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        cells = {column: feature.get("feature", feature) for column, feature in features.items()}
        return {column: list(cell["names"]) for column, cell in cells.items() if cell.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # not written by datasets
        return {}


def named(rows: list[dict[str | int, object]], classes: Mapping[str, list[str]]) -> Batch:
    """Return rows with the names of classes in place of their numbers; None for no class, -1."""
    for column, names in classes.items():
        for row in rows:
            row[column] = _name(row.get(column), names)
    return rows


def _name(cell: object, names: list[str]) -> object:
    if isinstance(cell, list):
        return [_name(one, names) for one in cell]
    if not isinstance(cell, int):
        return cell
    return names[cell] if 0 <= cell < len(names) else None if cell == -1 else cell
