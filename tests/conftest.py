"""Fixtures that several folders share."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings
from tiny_bert import save_tiny_bert

if TYPE_CHECKING:
    from fastmtl.data.packed_batch import PackedBatch
    from fastmtl.model.multitask import MultiTaskModel

# The same examples in every run, so that a commit either passes or fails.
# --hypothesis-profile=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


gc.disable()  # until all modules are imported: collections would look at their objects again and again


def pytest_collection_finish() -> None:
    """Exclude the objects made by imports, millions that stay alive, from garbage collection."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look for leaks at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that two processes finish at about the same time."""

    def seconds(item: pytest.Item) -> float:
        slow = item.get_closest_marker("slow")
        return 0.0 if slow is None else next(iter(slow.args), 5.0)

    items.sort(key=seconds, reverse=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed the generators before the fixtures of a test: a commit either passes or fails."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Restore os.environ after a test: a run sets RANK, which would affect later runs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Fail the test that leaves a process group, instead of a later one of the same process."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test leaves a process group")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


# GPU tests of the kernels run without the models' packages, so these are imported late.
@pytest.fixture(scope="session")
def make_batch() -> Callable[..., PackedBatch]:
    from packed_batches import build_batch

    return build_batch


@pytest.fixture
def make_model(tiny_bert: Path) -> Callable[..., MultiTaskModel]:
    """Return make_model(section={...}, ...): recipe sections for the tasks of packed_batches.py."""
    from packed_batches import build_model

    return partial(build_model, tiny_bert)
