"""A step told as what is held, dropped and touched, in bytes; it remembers its fullest moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastmtl.measure.parts import Bytes, Part, total, zero_bytes


class Ledger:
    """peak: the parts at the fullest moment so far. at: the name of the phase it was in."""

    def __init__(self, held: Bytes) -> None:
        self.held = dict(held)
        self.peak = dict(held)
        self.at = self.phase = ""

    def hold(self, part: Part, nbytes: int) -> None:
        self.held[part] += nbytes
        self._look()

    def drop(self, part: Part, nbytes: int) -> None:
        self.held[part] -= nbytes
        assert self.held[part] >= 0, (part, self.phase, self.held)

    def touch(self, nbytes: int, part: Part = "workspace") -> None:
        """For a moment only."""
        self.hold(part, nbytes)
        self.drop(part, nbytes)

    @contextmanager
    def holding(self, nbytes: int, part: Part = "workspace") -> Iterator[None]:
        self.hold(part, nbytes)
        yield
        self.drop(part, nbytes)

    def _look(self) -> None:
        if total(self.held) > total(self.peak):
            self.peak, self.at = dict(self.held), self.phase


def fullest(ledger: Ledger) -> Bytes:
    return ledger.peak if total(ledger.peak) else zero_bytes()
