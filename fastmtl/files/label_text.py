"""One spelling for a label, whichever format a file has."""

from __future__ import annotations

import math


def as_label(value: object) -> str:
    """Return the label that a cell or a name stands for, "" for none.

    A whole number has no decimals: CSV's `1` and `1.0`, JSON's 1 and Parquet's 1.0 are all "1".
    Booleans are "true" and "false" in every spelling. Other text stays as it is, without the spaces
    around it.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    number = as_number(text)
    return str(int(number)) if number is not None and number.is_integer() and abs(number) < 2**53 else text


def as_number(text: str) -> float | None:
    """Return the finite number that a text spells with ASCII digits, None for any other text."""
    if not text.isascii() or "_" in text:  # Python reads 1_0 and other scripts' digits too
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
