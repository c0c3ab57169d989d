"""Surgery in `transformers.Trainer`: a single process, DistributedDataParallel or DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from fastmtl.errors import UserError
from fastmtl.integrations.accelerate import AcceleratedSurgery
from fastmtl.integrations.loop import CountRows, LossesOf
from fastmtl.integrations.optional import require
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.targets.adamw import SurgeryAdamW


class SurgeryState(TrainerCallback, ExportableState):
    """Entry of a checkpoint's trainer_state.json with the state of surgery.

    saved: the state in the checkpoint from which the run continues.
    """

    surgery: AcceleratedSurgery | None = None
    saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        saved = self.saved if self.surgery is None else self.surgery.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}


class MultiTaskTrainer(Trainer):
    """`transformers.Trainer` that merges the tasks' gradients in every optimizer step.

    A task's loss is the mean over its rows in all micro-batches and ranks of the step. The logged
    `loss` is the sum of the weighted losses; logs also have each task's loss in the last step, and
    with a method other than "sum" the `conflict_rate`. The `eval_loss` is the mean over all rows.

    Args:
        args: those of Trainer.
        tasks, method: as in GradientSurgery.
        trunk, losses_of, task_column, count_rows: see `fastmtl.integrations.loop.LoopSurgery`.
        surgery: further arguments of GradientSurgery, for example {"storage": "kept"}.
        keywords: those of Trainer, except for `compute_loss_func` and, without a `prediction_step`
            of your own, `compute_metrics`.

    Attributes:
        info: the report of the last step, None before.

    Raises:
        UserError: an unsupported argument of Trainer or GradientSurgery.
    """

    def __init__(
        self,
        *args: Any,
        tasks: Sequence[str],
        method: str = "pcgrad",
        trunk: nn.Module | str | None,
        losses_of: LossesOf,
        task_column: str = "task",
        count_rows: CountRows | None = None,
        surgery: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        require("accelerate", "MultiTaskTrainer")
        self.info: SurgeryInfo | None = None
        self._losses_of, self._task_column = losses_of, task_column
        self._arguments: dict[str, Any] = {
            "tasks": tasks,
            "method": method,
            "trunk": trunk,
            "losses_of": losses_of,
            "task_column": task_column,
            "count_rows": count_rows,
            **(surgery or {}),
        }
        self._surgery: AcceleratedSurgery | None = None
        self._run_of_surgery: object = None
        super().__init__(*args, **keywords)
        self._check_arguments()
        self.add_callback(SurgeryState())

    def _check_arguments(self) -> None:
        args = self.args
        unsupported = {
            "compute_loss_func": (self.compute_loss_func is not None, "compute the losses in losses_of"),
            "label_smoothing_factor": (args.label_smoothing_factor != 0, "smooth the labels in losses_of"),
            "n_gpu": (args.n_gpu > 1, "start one process per GPU, for example with torchrun or deepspeed"),
            "optim": (args.optim in ("lomo", "adalomo"), "choose an optimizer that takes gradients from .grad"),
            "compute_metrics": (
                self.compute_metrics is not None and type(self).prediction_step is MultiTaskTrainer.prediction_step,
                "override prediction_step, since losses_of returns no predictions",
            ),
            "optimizers": (
                isinstance(self.optimizer, SurgeryAdamW),
                "give another optimizer than SurgeryAdamW, which keeps no .grad for the Trainer to clip",
            ),
        }
        for name, (given, advice) in unsupported.items():
            if given:
                raise UserError(f"{name}: unsupported by MultiTaskTrainer: {advice}")

    def train(self, *args: Any, **keywords: Any) -> Any:
        """Train as Trainer does, and leave the model without surgery."""
        try:
            return super().train(*args, **keywords)
        finally:
            self._detach()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch; run the whole step with the last one.

        Returns the sum of the tasks' weighted losses for the last one, 0 before.
        """
        if self._run_of_surgery is not self.state:  # Trainer makes a new state for each run
            self._attach(model)
        assert self._surgery is not None
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        with self.compute_loss_context_manager():
            info = self._surgery.backward(self._prepare_inputs(inputs))
        if info is None:
            return torch.zeros((), device=self.args.device)
        self.info = info
        weights = self._arguments.get("task_weights") or {}
        return torch.tensor(
            sum(weights.get(task, 1.0) * loss for task, loss in info.losses.items()), device=self.args.device
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a batch's rows, for evaluation.

        With `return_outputs`, return (loss, {}), since losses_of returns no outputs.
        """
        losses = list(self._losses_of(model, inputs).values())
        loss = torch.stack([found for found, _ in losses]).sum() / max(sum(rows for _, rows in losses), 1)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (loss, None, None) of a batch in evaluation.

        Raises UserError for predictions, which losses_of does not return.
        """
        if not prediction_loss_only:
            raise UserError("predictions: losses_of returns losses only: override prediction_step of MultiTaskTrainer")
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """Log as Trainer does; training logs get the losses and conflicts of the last step."""
        if self.info is not None and "loss" in logs:
            logs.update({f"loss_{task}": loss for task, loss in self.info.losses.items()})
            if self.info.conflict_rate is not None:
                logs["conflict_rate"] = self.info.conflict_rate
        super().log(logs, *args, **keywords)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._task_column not in columns:
            columns.append(self._task_column)

    def _attach(self, model: nn.Module) -> None:
        """Make surgery for a run, and continue from its checkpoint if it has one."""
        self._detach()
        self._surgery = AcceleratedSurgery(self.accelerator, model, self.optimizer, **self._arguments)
        # A checkpoint of a plain Trainer has no entry, but Trainer needs one to save the next.
        states: Any = self.state.stateful_callbacks
        saved = states.setdefault(SurgeryState.__name__, SurgeryState().state())["attributes"]["saved"]
        if saved is not None:
            self._surgery.load_state_dict(saved)
        self._save_state_of(self._surgery)
        self._run_of_surgery = self.state

    def _detach(self) -> None:
        if self._surgery is not None:
            self._surgery.detach()
        self._surgery = None
        self._save_state_of(None)

    def _save_state_of(self, surgery: AcceleratedSurgery | None) -> None:
        """Let checkpoints save the state of `surgery`."""
        for callback in self.callback_handler.callbacks:  # Trainer may have replaced it on resume
            if isinstance(callback, SurgeryState):
                callback.surgery, callback.saved = surgery, None
