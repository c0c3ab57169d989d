"""Protocol of loss weights that are known before a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fastmtl.surgery.info import SurgeryInfo


class StepWeights(Protocol):
    """Weights of the tasks' losses, one step after another.

    Every rank makes the object and calls its methods with equal arguments, so the weights are equal
    on all ranks. `state_dict` can be saved as JSON at any step.
    """

    def weights(self) -> dict[str, float]:
        """Return {task: weight of its loss} for the next step."""
        ...

    def after_step(self, info: SurgeryInfo) -> None:
        """Learn from a step. info: its result; `info.skipped` is None for a step that was taken."""
        ...

    def after_epoch(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
