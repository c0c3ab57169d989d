"""Surgery in a loop of Lightning Fabric: a single device or DistributedDataParallel."""

from __future__ import annotations

from typing import Any

from fastmtl.errors import UserError
from fastmtl.integrations.loop import LoopSurgery, check_model
from fastmtl.integrations.optional import require


class FabricSurgery(LoopSurgery):
    """Surgery whose `add` and `run` take the place of forward, loss and `fabric.backward`.

    Call `add(batch)` for each micro-batch of a step and `run()` once, then `optimizer.step()`
    unless the report's `skipped` is set. `fabric.save` and `fabric.load` take this object in their
    state.

    fabric: the Fabric. model, optimizer: as `fabric.setup` returns them. arguments: those of
    `fastmtl.integrations.loop.LoopSurgery`.

    Raises UserError for other strategies, and for a gradient scaler.
    """

    def __init__(self, fabric: Any, model: Any, optimizer: Any, method: str = "pcgrad", **arguments: Any) -> None:
        require("lightning", "FabricSurgery")
        if not hasattr(fabric, "strategy"):
            raise UserError(f"fabric is of type {type(fabric).__name__}: give the lightning.fabric.Fabric")
        check_strategy(fabric.strategy)
        check_model(model)
        super().__init__(getattr(optimizer, "optimizer", optimizer), model, method, **arguments)


def check_strategy(strategy: Any) -> None:
    """Raise UserError for a strategy of Lightning that surgery does not support."""
    name = type(strategy).__name__
    if name not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise UserError(
            f"strategy: {name} is unsupported: use a single device or DDP; for DeepSpeed use "
            "fastmtl.integrations.trainer, fastmtl.integrations.accelerate, or its own loop (docs/surgery.md)"
        )
    precision = getattr(strategy, "precision", None) or strategy.precision_plugin
    if getattr(precision, "scaler", None) is not None:
        raise UserError('precision: "16-mixed" scales gradients, which surgery does not know of: use "bf16-mixed"')
