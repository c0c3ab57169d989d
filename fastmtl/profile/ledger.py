"""A simulation of a step's memory: bytes are held, dropped and touched, and the peak is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastmtl.measure.parts import Bytes, Part, total


class Ledger:
    """Bytes held now, by part.

    peak: the parts at the largest total so far. phase: the current phase, set by the caller. at:
    the phase of the peak.
    """

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
        """Hold bytes and drop them at once, so that they count for the peak only."""
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
