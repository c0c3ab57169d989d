"""Surgery in `lightning.Trainer`: a single device or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.integrations.fabric import check_strategy
from fastmtl.integrations.loop import CountRows, LoopSurgery
from fastmtl.integrations.optional import require
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.random_state import RandomState
from fastmtl.surgery.ranks.collectives import gather_over_ranks
from fastmtl.surgery.targets.adamw import SurgeryAdamW

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

    Raises:
        UserError: an invalid argument; when training starts, an unsupported strategy, precision,
            optimizer or scheduler.
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
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise UserError(f"accumulate must be a positive number of micro-batches, got {accumulate!r}")
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
        self._random: list[tuple[Tensor, Tensor | None]] = []  # of each rank, from a checkpoint

    def losses_of(self, batch: Any) -> Losses:
        """Return {task: (sum of the rows' losses, number of rows)} of a batch."""
        raise UserError(f"losses_of: define losses_of(self, batch) in {type(self).__name__}")

    def after_step(self, info: SurgeryInfo) -> None:
        """Log the losses of a step and its conflicts. info: the report of the step."""
        self.log_dict({f"loss_{task}": loss for task, loss in info.losses.items()})
        if info.conflict_rate is not None:
            self.log("conflict_rate", info.conflict_rate)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Keep a micro-batch; run and update the whole step with the last one."""
        if self._surgery is None:
            raise UserError(
                "training_step: surgery begins in on_train_start: train with Trainer.fit, and call "
                "super().on_train_start() in an override"
            )
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
        if self.automatic_optimization:
            raise UserError("automatic_optimization: MultiTaskModule steps the optimizer itself: leave it at False")
        optimizer: Any = self.optimizers()
        if isinstance(optimizer, list):
            raise UserError(f"configure_optimizers: gave {len(optimizer)} optimizers: surgery needs a single one")
        if self.max_norm is not None and isinstance(optimizer.optimizer, SurgeryAdamW):
            raise UserError("max_norm: SurgeryAdamW keeps no .grad to clip: give max_norm to SurgeryAdamW instead")
        if any(config.reduce_on_plateau for config in self.trainer.lr_scheduler_configs):
            raise UserError("configure_optimizers: ReduceLROnPlateau is unsupported: use a scheduler without a metric")
        self.on_train_end()  # of a run that has ended with an error
        self._surgery = LoopSurgery(
            optimizer.optimizer, self, losses_of=lambda module, batch: module.losses_of(batch), **self._arguments
        )
        if self._saved is not None:
            self._surgery.load_state_dict(self._saved)
        if len(self._random) == self.trainer.world_size:
            RandomState(*self._random[self.global_rank], self.device).restore()
        self._random = []

    def on_train_end(self) -> None:
        if self._surgery is not None:
            self._surgery.detach()
        self._surgery = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of surgery, and the random state of every rank. All ranks call this."""
        checkpoint["surgery"] = None if self._surgery is None else self._surgery.state_dict()
        if self._surgery is None:
            return
        state = RandomState.capture(self.device)
        checkpoint["surgery_random"] = gather_over_ranks((state.cpu, None if state.cuda is None else state.cuda.cpu()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved, self._random = checkpoint.get("surgery"), checkpoint.get("surgery_random", [])

    def _step_schedulers(self, interval: str, number: int) -> None:
        """Step the schedulers of an interval, as Lightning does not in manual optimization."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and number % config.frequency == 0:
                scheduler: Any = config.scheduler
                scheduler.step()
