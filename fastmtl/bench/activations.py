"""Measurement of the bytes that forward keeps for backward.

Tensor accounting adds up the bytes of the tensors, so the result is exact, and the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastmtl.bench.textbook import PaddedModel
from fastmtl.bench.workload import Workload
from fastmtl.measure import ranges
from fastmtl.measure.accounting import Accounting
from fastmtl.model.multitask import MultiTaskModel


def kept_bytes(workload: Workload, build: Callable[[Workload], PaddedModel | MultiTaskModel]) -> dict[str, float]:
    """Return the bytes that the forward of all tasks' rows keeps for backward, per real token.

    build: returns the model of a workload.
    kept_bytes_per_token: of the whole model in training. kept_bytes_per_token_and_layer: of one
    layer, which is the difference between a model of two layers and one of one layer.
    """
    counts = {}
    for number in {1, 2, workload.shape.layers}:
        work = workload if number == workload.shape.layers else workload.with_layers(number)
        model = build(work)
        counts[number] = _kept(model.train(), _forward(work, model), work.device)
    tokens = workload.packed_batch.num_tokens
    return {
        "kept_bytes_per_token": counts[workload.shape.layers] / tokens,
        "kept_bytes_per_token_and_layer": (counts[2] - counts[1]) / tokens,
    }


def _forward(workload: Workload, model: PaddedModel | MultiTaskModel) -> Callable[[], object]:
    if isinstance(model, PaddedModel):
        batches = workload.padded_batches
        return lambda: [model.loss(task, model.features(batch), batch) for task, batch in enumerate(batches)]
    return lambda: model(workload.packed_batch)


def _kept(model: nn.Module, forward: Callable[[], object], device: torch.device) -> int:
    with torch.no_grad():
        forward()  # tables that are cached, of rotations for instance, are not counted
    accounting = Accounting(device)
    accounting.name([*model.parameters(), *model.buffers()], "weights")
    with accounting, ranges.listening(accounting.on_range):
        with ranges.profile_range("forward"):
            losses = forward()
        found = accounting.alive("activations")
        del losses
    return found
