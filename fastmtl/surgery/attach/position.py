"""The row map of the code that runs now: in forward by blocks, in backward by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery.attach.row_map import OneTask, RowMap
from fastmtl.surgery.attach.sites import Site
from fastmtl.surgery.rules.trees import tensors_in


class Position:
    """The innermost `rows` block or run of one task in forward; in backward, that of a forward that
    checkpointing repeats.

    maps: of the blocks since the last backward.
    """

    def __init__(self) -> None:
        self.maps: list[RowMap] = []
        self._where: list[RowMap | OneTask] = []
        self._again: RowMap | OneTask | None = None  # the map of the forward that backward is in

    @contextmanager
    def block(self, rows: RowMap) -> Iterator[None]:
        """Let the forwards inside the block, and their repetitions in backward, have these rows."""
        self.maps.append(rows)
        with self.inside(rows):
            yield

    @contextmanager
    def inside(self, where: RowMap | OneTask) -> Iterator[None]:
        """Let `now` be `where` inside the block."""
        self._where.append(where)
        try:
            yield
        finally:
            self._where.pop()

    @property
    def now(self) -> RowMap | OneTask | None:
        """The map of the innermost block or run; None outside of all."""
        return self._where[-1] if self._where else None

    def mark(self, where: RowMap | OneTask, tree: Any) -> None:
        """Let backward know `where` it is as soon as it reaches the tensors of `tree`."""

        def enter(_: Tensor) -> None:
            self._again = where

        for x in tensors_in(tree):
            if x.requires_grad:
                x.register_hook(enter)

    def of_backward(self, site: Site) -> RowMap | OneTask | None:
        """Return the map of a site whose forward checkpointing repeats in backward."""
        if self._again is None and len(self.maps) < 2:
            return self.maps[0] if self.maps else None
        if self._again is None:
            raise UserError(
                "rows: activation checkpointing repeats a forward in backward, but several blocks precede this "
                "backward, and the output of `model` does not show which one: call `model` itself in each block, or "
                "run a backward after each block, with last=False"
            )
        if isinstance(self._again, OneTask) and not site.inside:  # what is repeated contains the runs per task
            return self._again.every
        return self._again

    def forget(self) -> None:
        """Drop all maps, at the end of backward."""
        self._again = None
        self.maps.clear()
