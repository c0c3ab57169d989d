"""Measurement of the agreement of tasks in each layer, in a user's own training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fastmtl.errors import UserError
from fastmtl.files.writing import replace_text, writing
from fastmtl.surgery.diagnosis.layers import layers_of
from fastmtl.surgery.diagnosis.measured import Measured
from fastmtl.surgery.diagnosis.page import diagnosis_page
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.sinks.layer_gramians import LayerGramians


def diagnose(surgery: GradientSurgery, *, every: int = 10, layer_of: Callable[[str], str] | None = None) -> Diagnosis:
    """Measure cosines and norms of task gradients in each layer, in some steps of a training loop.

        diagnosis = diagnose(surgery, every=10)
        ...  # the training loop, unchanged
        diagnosis.write("report.html")

    Updates keep their bits: a measured step computes the same Gramian and merged gradient, and the
    Gramian of each layer besides. No measurement makes the host wait for the device.

    Args:
        surgery: the loop's GradientSurgery, in any storage, stage and number of processes. For
            joint training, use its method "equal".
        every: measure the first step from now on and every n-th after it.
        layer_of: layer_of(name of a parameter) -> name of its layer. Default: a block of a list is
            a layer (`encoder.layer.3`), and everything else goes by its module (`embeddings`).

    Raises:
        UserError: the method "sum", scope "tensor", reduce "sketch" or `cuda_graphs`; a surgery
            that is measured already; an `every` that is no positive integer.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UserError(f"every must be a positive number of steps, got {every!r}")
    if not isinstance(surgery, GradientSurgery):
        raise UserError(
            f"surgery is of type {type(surgery).__name__}: give a GradientSurgery, which an integration has as its "
            "attribute `surgery`"
        )
    if layer_of is not None and not callable(layer_of):
        raise UserError(f"layer_of is of type {type(layer_of).__name__}: give a function from a name to its layer's")
    return Diagnosis(surgery, every, layer_of)


class Diagnosis:
    """Measurements that `diagnose` has started. Holds L T^2 numbers per measured step.

    layer_of: number of each shared parameter's layer, by the parameter's id.
    """

    def __init__(self, surgery: GradientSurgery, every: int, layer_of: Callable[[str], str] | None) -> None:
        names = surgery.shared_names
        found = layers_of(list(names.values())) if layer_of is None else [layer_of(name) for name in names.values()]
        self.tasks, self.layers = list(surgery.tasks), list(dict.fromkeys(found))
        numbers = {layer: number for number, layer in enumerate(self.layers)}
        self.layer_of: Mapping[int, int] = {key: numbers[layer] for key, layer in zip(names, found, strict=True)}
        self._surgery, self._every, self._steps = surgery, every, 0
        self._taken: list[tuple[int, LayerGramians]] = []
        surgery.watch(self)

    def next_step(self) -> bool:
        """Count a step; return True if it is to be measured."""
        self._steps += 1
        return (self._steps - 1) % self._every == 0

    def take(self, step: int, layers: LayerGramians) -> None:
        """Keep a step's Gramians, which the step will compute on the device."""
        self._taken.append((step, layers))

    def stop(self) -> None:
        """End the measurements. The numbers so far stay."""
        self._surgery.watch(None)

    def gramians(self) -> tuple[list[int], np.ndarray]:
        """Return the numbers of the measured steps, and float64 [steps, L, T, T].

        G[l, i, j] is the inner product of the gradients of tasks i and j in layer l, without loss
        scale, over all ranks; with `reduce="local"`, the mean of those of the ranks. Not finite in
        a step that was skipped for that. Waits for the device.
        """
        taken = [(step, layers.found, layers.scale) for step, layers in self._taken if layers.found is not None]
        if not taken:
            return [], np.zeros((0, len(self.layers), len(self.tasks), len(self.tasks)))
        scales = np.array([scale for _, _, scale in taken])[:, None, None, None]
        stacked = torch.stack([found for _, found, _ in taken]).double().cpu().numpy()
        return [step for step, _, _ in taken], stacked / scales**2

    def measured(self) -> Measured:
        """Return cosines, norms and conflicts of the steps so far. Waits for the device."""
        return Measured(self.tasks, self.layers, *self.gramians())

    def write(self, path: str | Path) -> Path:
        """Write a page on the steps so far, and its numbers to a .json file beside it.

        Rank 0 writes; other ranks may call this method, too. The page is one file without external
        assets. Returns its path.

        Raises:
            UserError: no step has been measured yet; a path that ends with .json.
            TrainingError: the files cannot be written.
        """
        path, measured = Path(path), self.measured()
        if path.suffix == ".json":
            raise UserError(f"{path}: the page is HTML, and its numbers go to a .json file beside it: name it .html")
        if not measured.steps:
            left = f"; {measured.left_out} had gradients that are not finite" if measured.left_out else ""
            raise UserError(f"{path}: no step has been measured yet{left}: write after a step of the training loop")
        if not dist.is_initialized() or dist.get_rank() == 0:
            with writing(path):
                replace_text(path, diagnosis_page(measured))
                replace_text(path.with_suffix(".json"), json.dumps(measured.as_json()))
        return path
