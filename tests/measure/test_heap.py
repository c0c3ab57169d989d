from __future__ import annotations

import os
import platform
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fastmtl import loop
from fastmtl.config import load_recipe
from fastmtl.data.corpus import Corpus
from fastmtl.measure import heap
from fastmtl.measure.harness import MIB, heap_bytes, in_own_process, resident_bytes

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

with_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
with_huge_pages = pytest.mark.skipif(
    not PAGES.exists() or "[never]" in PAGES.read_text(), reason="Linux gives no huge pages here"
)


@with_glibc
def test_holes_go_back_to_the_system() -> None:
    with_holes, without = in_own_process(around_a_trim, preload="fastmtl.bench.kernels")
    assert with_holes - without > 30 * MIB


def around_a_trim() -> tuple[int, int]:
    """Return resident bytes before and after a trim.

    Every second of many small blocks is freed; no hole is at the heap's end.
    """
    blocks = [torch.ones(MIB // 32) for _ in range(800)]
    del blocks[::2]
    before = resident_bytes()
    heap.trim()
    after = resident_bytes()
    assert before is not None and after is not None and len(blocks) == 400
    return before, after


@with_glibc
@with_huge_pages
def test_large_blocks_leave_no_holes_and_have_huge_pages() -> None:
    mapped, huge, held, left = in_own_process(around_large_blocks, {}, preload="fastmtl.bench.kernels")
    assert mapped and held > 190 * MIB and huge > 0.7 * held
    assert left < held - 90 * MIB


@pytest.mark.slow
@with_glibc
@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TOP_PAD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"},
        {"THP_MEM_ALLOC_ENABLE": "0"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_what_a_user_has_chosen_stays(variables: dict[str, str]) -> None:
    mapped, _, held, left = in_own_process(around_large_blocks, variables, preload="fastmtl.bench.kernels")
    assert not mapped
    assert left > held - 20 * MIB


def around_large_blocks(variables: dict[str, str]) -> tuple[bool, int, int, int]:
    """Return whether large blocks are mapped, their huge bytes, and two increases of memory.

    The increases of resident bytes are those with 20 blocks of 10 MiB, and after every second one
    was freed.
    """
    os.environ.update(variables)
    mapped = heap.map_large_blocks()
    torch.ones(6 * MIB)  # glibc then keeps blocks up to this size in its heap
    before = resident_bytes()
    blocks = [torch.ones(10 * MIB // 4) for _ in range(20)]
    huge, held = heap._huge_bytes(), resident_bytes()
    del blocks[::2]
    left = resident_bytes()
    assert before is not None and held is not None and left is not None and len(blocks) == 10
    return mapped, huge, held - before, left - before


@with_glibc
@with_huge_pages
def test_an_evaluation_leaves_no_holes_of_small_blocks_either() -> None:
    in_evaluation, in_a_step = in_own_process(around_an_evaluation, preload="fastmtl.bench.kernels")
    assert in_evaluation < 10 * MIB
    assert in_a_step > 20 * MIB


def around_an_evaluation() -> tuple[int, int]:
    """Return resident bytes that remain after every second of 60 blocks of 1 MiB is freed.

    In an evaluation and after it, not before: blocks that fit into holes are never mapped.
    """

    def stays(*_: object, **__: Any) -> int:
        blocks = [torch.ones(MIB // 4) for _ in range(60)]
        held = resident_bytes()
        del blocks[::2]
        left = resident_bytes()
        assert held is not None and left is not None and len(blocks) == 30
        return 30 * MIB - (held - left)

    assert heap.map_large_blocks()
    loop.score = stays  # type: ignore[assignment]
    recipe = load_recipe("demo")
    corpus = Corpus([], [None] * len(recipe.task_names))
    evaluate = partial(loop.evaluate, recipe, Mock(), corpus, Mock())
    return evaluate(), stays()  # type: ignore[return-value]


def test_a_run_maps_large_blocks_before_it_makes_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Called(Exception):
        pass

    def called() -> None:
        raise Called

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(heap, "map_large_blocks", called)
    monkeypatch.setattr(loop, "this_process", lambda _: pytest.fail("other processes were joined before"))
    with pytest.raises(Called):
        loop.train(load_recipe("demo"), tmp_path)


@with_glibc
def test_onednn_keeps_few_primitives() -> None:
    kept, all_kept = (
        in_own_process(kept_of_many_shapes, few, preload="fastmtl.bench.kernels") for few in (True, False)
    )
    assert kept < 0.5 * all_kept


def kept_of_many_shapes(few: bool) -> int:
    """Return the used bytes of the heap after GELU has run on 300 shapes."""
    if few:
        heap.map_large_blocks()
    torch.nn.functional.gelu(torch.ones(1, 8))
    before = heap_bytes().in_use
    for rows in range(2, 302):
        torch.nn.functional.gelu(torch.ones(rows, 8))
    return heap_bytes().in_use - before
