"""Settings of the tests that run in Triton's interpreter, in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
from hypothesis import Phase, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = [
    pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_interpreter.py"),
    pytest.mark.usefixtures("on_cpu_tensors"),
]


def few(examples: int) -> settings:
    """Return settings for few examples, without shrinking, which would take minutes."""
    return settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
