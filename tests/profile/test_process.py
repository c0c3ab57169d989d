"""Points in separate processes: their failures, and the messages."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest
import torch

from fastmtl.config import load_recipe
from fastmtl.profile import process
from fastmtl.profile.process import Outcome

# Functions that a new process can import: from the standard library, torch and fastmtl.


@pytest.mark.slow
def test_it_returns_what_the_function_does() -> None:
    assert process.run(math.factorial, 5) == Outcome(120)  # type: ignore[arg-type]


@pytest.mark.parametrize(("function", "argument"), [(bytearray, 1 << 62), (torch.empty, 1 << 55)])
def test_a_want_of_memory_is_no_other_failure(function: Any, argument: int) -> None:
    outcome = process.run(function, argument)
    assert outcome.out_of_memory and outcome.result is None and outcome.failed


def test_a_killed_process_wanted_too_much() -> None:
    outcome = process.run(signal.raise_signal, signal.SIGKILL)  # type: ignore[arg-type]
    assert outcome.out_of_memory
    assert "more memory than there is" in outcome.failed


def test_other_ends_are_none_of_memory() -> None:
    assert process.run(os._exit, 7) == Outcome(None, "its process ended with status 7: no output")
    outcome = process.run(load_recipe, "demmo")  # type: ignore[arg-type]
    assert not outcome.out_of_memory and "Did you mean 'demo'?" in outcome.failed
    outcome = process.run(math.sqrt, -1)  # type: ignore[arg-type]
    assert not outcome.out_of_memory and "math domain error" in outcome.failed


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert process.run(print, "loud") == Outcome(None)  # type: ignore[arg-type]
    assert "loud" not in "".join(capfd.readouterr())
