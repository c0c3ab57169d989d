"""Questions of a SQuAD file (version 1.1 or 2.0) as records.

The file is one JSON object: {"data": [{"paragraphs": [{"context": text, "qas": [question, ...]}]}]}
with questions {"id", "question", "answers": [{"text", "answer_start"}], "is_impossible"}.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmtl.data.file_bytes import Content, ending, find_bad_byte
from fastmtl.data.records import BadRow, OnBadRow, Record, Source
from fastmtl.errors import UserError, quoted

HEADER = ["id", "question", "context", "answers"]


def open_squad(path: Path, bad: OnBadRow, *, certain: bool) -> Source | None:
    """Return the questions of a SQuAD file, a .json; None for a file that is none.

    The answers of a question with is_impossible do not count. certain: True if the recipe says that
    the file is one, so that wrong JSON is an error. Raises UserError for a file that cannot be
    read.
    """
    if ending(path) != ".json":
        return None
    content = Content(path)
    first = next(content.lines(), (1, ""))[1]
    found = _parsed(first)
    if found is None:  # not a JSON object in one line
        whole = b"".join(content.pieces())
        try:
            found = json.loads(whole.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            byte = f"byte 0x{whole[error.start]:02x}"
            raise UserError(f"{path}, byte {error.start + 1}: expected UTF-8, found {byte}") from None
        except (ValueError, RecursionError) as error:
            if not certain:
                return None
            at = f", line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{path}{at}: expected JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        return None
    articles = found["data"]
    return Source(HEADER, lambda _: _questions(articles, bad))


def _parsed(line: str) -> Any:
    """Return the JSON value that a line spells; None if it spells none."""
    try:
        return json.loads(line) if find_bad_byte(line) is None else None
    except (ValueError, RecursionError):
        return None


def _questions(articles: list[Any], bad: OnBadRow) -> Iterator[Record]:
    numbers = itertools.count(1)
    for where, article in _each(articles, "data", dict, bad):
        for within, paragraph in _each(_list_of(article, "paragraphs", where, bad), f"{where}.paragraphs", dict, bad):
            for at, question in _each(_list_of(paragraph, "qas", within, bad), f"{within}.qas", dict, bad):
                named = f"question {quoted(question['id'])} ({at})" if "id" in question else at
                answers = [] if question.get("is_impossible") is True else question.get("answers")
                found = (question.get("id"), question.get("question"), paragraph.get("context"), answers)
                yield Record(next(numbers), dict(zip(HEADER, found, strict=True)), named)


def _each(values: list[Any], name: str, kind: type, bad: OnBadRow) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each object of a list; report those that are none."""
    for number, value in enumerate(values):
        where = f"{name}[{number}]"
        if isinstance(value, kind):
            yield where, value
        else:
            bad(BadRow(where, name.rpartition(".")[2], f"expected an object, found {_shown(value)}"))


def _list_of(parent: Mapping[str, Any], key: str, where: str, bad: OnBadRow) -> list[Any]:
    value = parent.get(key)
    if isinstance(value, list):
        return value
    bad(BadRow(where, key, f"expected a list, found {_shown(value)}"))
    return []


def _shown(value: object) -> str:
    return {dict: "an object", list: "a list", type(None): "nothing"}.get(type(value)) or quoted(value)
