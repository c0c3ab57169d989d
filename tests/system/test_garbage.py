"""Imports without garbage collections."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from fastmtl.system.garbage import without_collections


@pytest.fixture(autouse=True)
def collections_as_before() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_go_on_as_before_even_after_an_error(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(ImportError), without_collections():
        assert not gc.isenabled()
        raise ImportError("no torch")
    assert gc.isenabled() == enabled


def test_only_the_objects_of_imports_are_skipped_later(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    with without_collections():
        found: list[list[int]] = [[] for _ in range(1000)]
    assert gc.get_freeze_count() <= before
    with without_collections():
        monkeypatch.setitem(sys.modules, "a_new_module", ModuleType("a_new_module"))
    assert gc.get_freeze_count() >= before + len(found)
