"""The tests of Triton kernels in Triton's interpreter, one process per group of operations.

Triton reads TRITON_INTERPRET when it is imported, so these tests need their own process. A process
takes seconds to start, so operations with short tests share one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from interpreter import INTERPRETED

HERE = Path(__file__).parent
# Operations that share a process, by the folders of their tests.
GROUPS = (
    ("add_layer_norm", "embed_layer_norm", "dropout", "pool", "geglu"),
    ("task_maps",),
    ("task_gradients", "combined_adamw"),
    ("varlen_attention",),
)


def files_of(folder: str) -> list[Path]:
    return sorted((HERE / folder).glob("test_*_interpreted.py"))


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.parametrize("folders", GROUPS, ids="-".join)
def test_kernels_in_the_interpreter(interpret: Callable[..., None], folders: tuple[str, ...]) -> None:
    interpret(*(file for folder in folders for file in files_of(folder)))


def test_every_file_is_run() -> None:
    """Every file of these tests is run by a process."""
    run = {file for folders in GROUPS for folder in folders for file in files_of(folder)}
    assert run == set(HERE.rglob("test_*_interpreted.py")) and len(run) == 11
