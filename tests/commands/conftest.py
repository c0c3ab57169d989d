"""Fixture of the tests of whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from saved_models import save_random_model


@pytest.fixture
def make(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return make(name, tasks, seed=0, section={...}, ...) -> a model with random weights."""

    def make(name: str, tasks: list[str] | dict[str, dict], *, seed: int = 0, **sections: dict) -> Path:
        return save_random_model(tmp_path / name, tiny_bert, tasks, seed=seed, **sections)

    return make
