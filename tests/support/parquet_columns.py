"""A random Parquet column of any type that pyarrow writes, and the texts that a reader returns."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from random import Random
from typing import Any

import pyarrow

# Values of types with a unique text form.
TEXTS: list[tuple[pyarrow.DataType, list[Any]]] = [
    (pyarrow.string(), ["a film", " two\u2028lines \n"]),
    (pyarrow.int8(), [0, -7]),
    (pyarrow.uint64(), [2**64 - 1]),
    (pyarrow.float64(), [0.5, 1e300]),
    (pyarrow.float32(), [0.25]),
    (pyarrow.bool_(), [True, False]),
    (pyarrow.decimal128(38, 3), [Decimal("12.500")]),
]
# Values that are not text, including nulls and non-finite numbers.
OTHERS: list[tuple[pyarrow.DataType, list[Any]]] = [
    (pyarrow.null(), [None]),
    (pyarrow.float64(), [float("nan"), float("inf"), None]),
    (pyarrow.binary(), [b"film", b"\xff"]),
    (pyarrow.binary(3), [b"abc"]),
    (pyarrow.list_(pyarrow.string()), [["a"], []]),
    (pyarrow.struct([("en", pyarrow.string())]), [{"en": "x"}]),
    (pyarrow.map_(pyarrow.string(), pyarrow.int32()), [[("a", 1)]]),
    (pyarrow.date32(), [date(2000, 1, 1)]),
    (pyarrow.timestamp("us", tz="UTC"), [datetime(2000, 1, 1, tzinfo=timezone.utc)]),
    (pyarrow.time64("us"), [time(1, 2)]),
    (pyarrow.duration("s"), [timedelta(seconds=3)]),
]


def draw_column(random: Random, rows: int) -> tuple[pyarrow.Array, list[str | None]]:
    """Draw an array of `rows` values, and for each its text, or None if it is not text."""
    kind, values = random.choice(TEXTS + OTHERS)
    drawn = [random.choice(values) for _ in range(rows)]
    array = pyarrow.array(drawn, type=kind)
    if (kind, values) in OTHERS:
        return array, [None] * rows
    return array, [" ".join(str(value).split()) for value in drawn]
