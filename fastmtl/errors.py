"""Exceptions with messages for users, and the quoting of input in these messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

QUOTED_CHARACTERS, LINE_CHARACTERS, LISTED_NAMES = 80, 1500, 40


class UserError(ValueError):
    """An error that the user can fix.

    The message names the file, line, key or argument and what to do. Commands print it without a
    traceback.

    lines: one mistake each. Every line is printable and without line breaks, whatever it quotes.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(one_line, lines))

    @property
    def lines(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class TrainingError(RuntimeError):
    """The run cannot continue, although its input is valid. The message says what to change."""


def quoted(value: object, limit: int = QUOTED_CHARACTERS) -> str:
    """Return a value from the user as it appears in a message.

    Text is in single quotes, any other value is its `repr`. The result is one line of at most
    `limit` characters, with unprintable ones escaped.
    """
    if not isinstance(value, str):
        return shortened(repr(value), limit)
    return f"'{shortened(value, limit)}'"


def shortened(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    """Return text as one line of at most `limit` characters, with unprintable ones escaped."""
    escaped = _escaped(text[: limit + 1])
    return escaped if len(text) <= limit and len(escaped) <= 4 * limit else f"{escaped[:limit]}..."


def listed(names: Iterable[object], limit: int = LISTED_NAMES) -> str:
    """Return the first `limit` names, separated by commas, and the number of the others."""
    every = [shortened(str(name)) for name in names]
    rest = len(every) - limit
    return ", ".join(every[:limit]) + (f", ... ({rest} more)" if rest > 0 else "")


def one_line(text: str) -> str:
    """Return a message as one printable line; a very long one loses its middle."""
    line = _escaped(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))
    if len(line) <= LINE_CHARACTERS:
        return line
    return f"{line[: LINE_CHARACTERS * 2 // 3]} ... {line[-LINE_CHARACTERS // 3 :]}"


def printable(text: str) -> str:
    """Return text of one line or several with unprintable characters escaped."""
    return "\n".join(map(_escaped, text.split("\n")))


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UserError:
    """Return the error for a misspelt name, with the nearest valid name and all valid ones.

    what: the kind of name, for the message.
    """
    choices = sorted(valid)
    by_small_letters = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name[:QUOTED_CHARACTERS].casefold(), by_small_letters, n=1, cutoff=0.5)
    hint = f" Did you mean {quoted(by_small_letters[near[0]])}?" if near else ""
    valid_ones = f"Valid: {listed(choices)}." if choices else "There is none."
    return UserError(f"unknown {what} {quoted(name)}.{hint} {valid_ones}")


def _escaped(text: str) -> str:
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
