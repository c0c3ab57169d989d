"""Labels as text, with one spelling for all file formats."""

from __future__ import annotations

import math


def as_label(value: object) -> str:
    """Return a label as text, "" for an empty cell.

    value: a cell of a data file, or a name in a recipe. A whole number has no decimals: CSV's `1`
    and `1.0`, JSON's 1 and Parquet's 1.0 are all "1". Booleans are "true" and "false" in every
    spelling. Other text stays, without the spaces around it.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    number = as_number(text)
    return str(int(number)) if number is not None and number.is_integer() and abs(number) < 2**53 else text


def as_number(text: str) -> float | None:
    """Return the number that a text in ASCII digits spells, None if it spells no finite number."""
    if not text.isascii() or "_" in text:  # Python's float also accepts 1_0 and the digits of other scripts
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
