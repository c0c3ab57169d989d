"""Surgery in a loop with `accelerator.prepare`: plain, DistributedDataParallel or DeepSpeed."""

from __future__ import annotations

from typing import Any

from fastmtl.errors import UserError
from fastmtl.integrations.loop import LoopSurgery
from fastmtl.integrations.optional import require
from fastmtl.surgery.info import SurgeryInfo

_SUPPORTED = {"NO", "DEEPSPEED", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"}


class AcceleratedSurgery(LoopSurgery):
    """Surgery whose `backward` takes the place of forward, loss and `accelerator.backward`.

    The rest of the loop stays: `accelerator.accumulate`, `accelerator.clip_grad_norm_` and the
    steps of optimizer and scheduler. `accelerator.register_for_checkpointing` takes this object.

    accelerator: the Accelerator. model, optimizer: as `accelerator.prepare` returns them.
    arguments: those of `fastmtl.integrations.loop.LoopSurgery`.

    Raises UserError for FSDP, Megatron-LM, XLA and a gradient scaler.
    """

    def __init__(self, accelerator: Any, model: Any, optimizer: Any, method: str = "pcgrad", **arguments: Any) -> None:
        require("accelerate", "AcceleratedSurgery")
        if not hasattr(accelerator, "distributed_type"):
            raise UserError(f"accelerator is of type {type(accelerator).__name__}: give the accelerate.Accelerator")
        kind = str(accelerator.distributed_type.value)
        if kind not in _SUPPORTED:
            raise UserError(f"accelerator: {kind} is unsupported: use a single process, DDP, or DeepSpeed's ZeRO")
        if accelerator.scaler is not None:
            raise UserError(
                "accelerator: mixed precision fp16 scales gradients, which surgery does not know of: use bf16, or fp16 "
                "under DeepSpeed"
            )
        self._accelerator = accelerator
        self._engine = model if kind == "DEEPSPEED" else None
        target = getattr(optimizer, "optimizer", optimizer) if self._engine is None else model
        super().__init__(target, model, method, **arguments)

    def backward(self, batch: Any) -> SurgeryInfo | None:
        """Keep a micro-batch; with the last one, run the whole step.

        The last one is that in which Accelerate synchronizes gradients.

        Under DeepSpeed, the engine then also updates, as in `accelerator.backward`. In a skipped
        step there is no update: the engine makes none, and an optimizer finds no `.grad`.

        Returns:
            The report of the step for its last micro-batch, None before.

        Raises:
            UserError, TrainingError: as GradientSurgery.run.
        """
        self.add(batch)
        if not self._accelerator.sync_gradients:
            return None
        info = self.run()
        if self._engine is not None and info.skipped is None:
            self._engine.step()
        return info
