"""Input in messages: one printable line, whatever its content."""

from __future__ import annotations

import pickle

import pytest

from fastmtl.errors import LINE_CHARACTERS, UserError, listed, one_line, quoted, unknown_name

HOSTILE = [
    "two\nlines",
    "\x1b[2J\x1b[31mred",
    "a\rb",
    "tab\there",
    "bell\x07",
    "\ud83d",
    "\u202eright to left",
    "\u2028",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_quoted_input_is_one_short_printable_line(text: str) -> None:
    for shown in (quoted(text), quoted([text]), quoted({text: 1}), listed([text] * 100)):
        assert shown.isprintable()
        shown.encode("utf-8")
    assert len(quoted(text)) < 100


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_is_one_printable_line_wherever_input_stands_in_it(text: str) -> None:
    for error in (UserError(f"{text}: no such file. Fix it."), unknown_name("key", text, ["a", text])):
        assert str(error).isprintable()
        assert len(str(error)) < LINE_CHARACTERS + 10
    assert str(UserError(f"the label {text} is wrong. Fix the row.")).endswith("Fix the row.")


def test_ordinary_input_stays_as_it_is() -> None:
    assert quoted("naïve ☃, 'so'") == "'naïve ☃, 'so''"
    assert quoted(5) == "5"
    assert quoted(None) == "None"
    assert one_line("while scanning\n  in line 3") == "while scanning in line 3"
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(42)).endswith("39, ... (2 more)")
    assert quoted("\x1b") == "'\\x1b'"


def test_a_name_is_found_whatever_the_case_of_its_letters() -> None:
    assert "Did you mean 'pcgrad'?" in str(unknown_name("method", "PCGrad", ["pcgrad", "upgrad"]))
    assert "Did you mean 'SST'?" in str(unknown_name("task", "sst", ["SST", "SQuAD"]))


def test_several_mistakes_are_several_lines_also_after_a_trip_to_another_process() -> None:
    error = UserError("one", "two\nlines")
    assert str(error) == "one\ntwo lines"
    assert pickle.loads(pickle.dumps(error)).lines == ("one", "two lines")
