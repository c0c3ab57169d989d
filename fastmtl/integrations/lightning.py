"""Surgery in `lightning.Trainer`: a single device or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastmtl.errors import UserError
from fastmtl.integrations.fabric import check_strategy
from fastmtl.integrations.loop import CountRows, LoopSurgery
from fastmtl.integrations.optional import require
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses

require("lightning", "MultiTaskModule")

from lightning import LightningModule  # noqa: E402


class MultiTaskModule(LightningModule):
    """LightningModule whose `training_step` runs surgery. A subclass defines `losses_of`.

    Optimization is manual: in automatic optimization Lightning runs backward for each micro-batch,
    but surgery needs all micro-batches of a step.

    Args:
        tasks, method: as in GradientSurgery.
        trunk, task_column, count_rows: see `fastmtl.integrations.loop.LoopSurgery`.
        accumulate: micro-batches per optimizer step; the last step of an epoch may have fewer.
        max_norm: bound of the gradient's norm in each step; None: no clipping.
        surgery: further arguments of GradientSurgery.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        method: str = "pcgrad",
        trunk: nn.Module | str | None,
        task_column: str = "task",
        count_rows: CountRows | None = None,
        accumulate: int = 1,
        max_norm: float | None = None,
        surgery: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate, self.max_norm = accumulate, max_norm
        self._arguments: dict[str, Any] = {
            "tasks": tasks,
            "method": method,
            "trunk": trunk,
            "task_column": task_column,
            "count_rows": count_rows,
            **(surgery or {}),
        }
        self._surgery: LoopSurgery | None = None
        self._saved: Mapping[str, Any] | None = None

    def losses_of(self, batch: Any) -> Losses:
        """Return {task: (sum of the rows' losses, number of rows)} of a batch."""
        raise NotImplementedError("define losses_of(self, batch) in your MultiTaskModule")

    def after_step(self, info: SurgeryInfo) -> None:
        """Log the losses of a step and its conflicts. info: the report of the step."""
        self.log_dict({f"loss_{task}": loss for task, loss in info.losses.items()})
        if info.conflict_rate is not None:
            self.log("conflict_rate", info.conflict_rate)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Keep a micro-batch; run and update the whole step with the last one."""
        assert self._surgery is not None
        self._surgery.add(batch)
        if (batch_idx + 1) % self.accumulate and not self.trainer.is_last_batch:
            return
        optimizer: Any = self.optimizers()
        info = self._surgery.run()
        if info.skipped is None:
            if self.max_norm is not None:
                self.clip_gradients(optimizer, self.max_norm, "norm")
            optimizer.step()
            self._step_schedulers("step", self.trainer.global_step)
        optimizer.zero_grad()
        self.after_step(info)

    def on_train_epoch_end(self) -> None:
        self._step_schedulers("epoch", self.current_epoch + 1)

    def on_train_start(self) -> None:
        check_strategy(self.trainer.strategy)
        optimizer: Any = self.optimizers()
        if isinstance(optimizer, list):
            raise UserError(f"configure_optimizers: gave {len(optimizer)} optimizers: surgery needs a single one")
        if any(config.reduce_on_plateau for config in self.trainer.lr_scheduler_configs):
            raise UserError("configure_optimizers: ReduceLROnPlateau is unsupported: use a scheduler without a metric")
        self.on_train_end()  # of a run that has ended with an error
        self._surgery = LoopSurgery(
            optimizer.optimizer, self, losses_of=lambda module, batch: module.losses_of(batch), **self._arguments
        )
        if self._saved is not None:
            self._surgery.load_state_dict(self._saved)

    def on_train_end(self) -> None:
        if self._surgery is not None:
            self._surgery.detach()
        self._surgery = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["surgery"] = None if self._surgery is None else self._surgery.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("surgery")

    def _step_schedulers(self, interval: str, number: int) -> None:
        """Step the schedulers of an interval, as Lightning does not in manual optimization."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and number % config.frequency == 0:
                scheduler: Any = config.scheduler
                scheduler.step()
