"""Training steps of a recipe, as in fastmtl.loop, with or without tensor accounting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.config import Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.measure import ranges
from fastmtl.measure.accounting import Accounting
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.profile.engine_tensors import gradient_buffers, optimiser_tensors, partitioned_weights
from fastmtl.surgery import SurgeryInfo
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.training.objectives import Objectives

# Length of the learning rate schedule; nothing else uses it.
TOTAL_STEPS = 1000


class Steps:
    """A DeepSpeed engine with gradient surgery that runs training steps of a model.

    model: on the CPU.
    """

    def __init__(self, recipe: Recipe, model: MultiTaskModel, world: int, device: torch.device) -> None:
        self._recipe, self._model, self._device = recipe, model, device
        for parameter in model.parameters():
            if parameter.requires_grad:  # before the engine registers its own hooks
                parameter.register_hook(self._gradient)
        self._objectives = Objectives(recipe, model)
        self._engine = build_engine(recipe, model, world, TOTAL_STEPS)
        self._surgery = build_surgery(recipe, self._engine, model)
        self._accounting = Accounting(device)
        assert isinstance(model.encoder, PackedEncoder)
        layers = model.encoder.layers
        self._accounting.watch_recomputation([*layers, *([] if model.adapter is None else [model.adapter])])
        self._engine.train()
        self._counting = False

    @property
    def storage(self) -> str:
        """The storage that `auto` selected."""
        return self._surgery.storage

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def step(self, micro_batches: Sequence[PackedBatch]) -> SurgeryInfo:
        with ranges.profile_range("data"):
            micro_batches = [batch.to(self._device) for batch in micro_batches]
        micro_batches = self._objectives.prepare(micro_batches)
        counts = dict(zip(self._recipe.task_names, micro_batches[0].group_counts or (), strict=True))
        info = self._surgery.run(micro_batches, _losses, counts, self._objectives.weights(None))
        if info.skipped is None:
            with ranges.profile_range("optimiser"):
                self._engine.step()
        self._objectives.after_step(info)
        return info

    def counted(self, micro_batches: Sequence[PackedBatch]) -> Accounting:
        """Run a step with tensor accounting, and return the accounting.

        The first step also makes J and the optimiser's state.
        """
        accounting = self._accounting
        self._name_persistent_tensors()
        accounting.reset_peak()
        self._counting = True
        try:
            with accounting, ranges.listening(accounting.on_range), ranges.listening(self._see_task_gradients):
                self.step(micro_batches)
        finally:
            self._counting = False
        self._name_persistent_tensors()
        return accounting

    def _name_persistent_tensors(self) -> None:
        name, optimizer = self._accounting.name, self._engine.optimizer
        name(optimiser_tensors(optimizer), "optimiser")
        # Named second, as an optimiser without masters holds the weights themselves.
        name([*self._model.parameters(), *self._model.buffers()], "weights")
        name(partitioned_weights(self._model, optimizer), "weights")
        name(gradient_buffers(optimizer), "gradients")
        name(self._surgery.kept_tensors(), "task gradients")
        bucket = getattr(optimizer, "reduce_bucket_size", None)
        if bucket is not None:  # ZeRO 1 and 2 drop their buckets within the step
            self._accounting.name_shape((bucket,), "gradients")

    def _see_task_gradients(self, name: ranges.Name, begins: bool) -> None:
        if name == "surgery" and begins:  # replay drops the task gradients at the end of this range
            self._accounting.name(self._surgery.kept_tensors(), "task gradients")

    def _gradient(self, gradient: Tensor | None) -> None:
        if self._counting and gradient is not None:
            self._accounting.name([gradient], "gradients")


def _losses(batch: PackedBatch, model: Any, task_grads: Sink) -> dict[str, tuple[Tensor, int]]:
    return model(batch, task_grads)
