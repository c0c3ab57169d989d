"""Measurement of the bytes that forward keeps for backward.

Tensor accounting adds up the bytes of the tensors, so the result is exact, and the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmtl.bench.textbook import PaddedModel
from fastmtl.bench.workload import Workload
from fastmtl.measure import ranges
from fastmtl.measure.accounting import Accounting
from fastmtl.model.multitask import MultiTaskModel


def kept_bytes(workload: Workload, model: PaddedModel | MultiTaskModel) -> dict[str, float]:
    """Return the bytes that the forward of all tasks' rows keeps for backward, per real token.

    kept_bytes_per_token: of the whole model in training. kept_bytes_per_token_and_layer: of one
    layer, which is the difference between a model of two layers and one of one layer.
    """
    encoder: Any = model.encoder
    # The same names in transformers' model and in fastmtl's.
    parts, name = (encoder._modules, "layers") if "layers" in encoder._modules else (encoder.encoder._modules, "layer")
    layers, counts = parts[name], {}
    with torch.no_grad():  # makes tables of rotations, which all later forwards share
        _forward(workload, model)()
    try:
        for number in (1, 2, len(layers)):
            parts[name] = layers[:number]
            counts[number] = _kept(model.train(), _forward(workload, model), workload.device)
    finally:
        parts[name] = layers
    tokens = workload.packed_batch.num_tokens
    return {
        "kept_bytes_per_token": counts[len(layers)] / tokens,
        "kept_bytes_per_token_and_layer": (counts[2] - counts[1]) / tokens,
    }


def _forward(workload: Workload, model: PaddedModel | MultiTaskModel) -> Callable[[], object]:
    if isinstance(model, PaddedModel):
        batches = workload.padded_batches
        return lambda: [model.loss(task, model.features(batch), batch) for task, batch in enumerate(batches)]
    return lambda: model(workload.packed_batch)


def _kept(model: nn.Module, forward: Callable[[], object], device: torch.device) -> int:
    accounting = Accounting(device)
    accounting.name([*model.parameters(), *model.buffers()], "weights")
    with accounting, ranges.listening(accounting.on_range):
        with ranges.profile_range("forward"):
            losses = forward()
        found = accounting.alive("activations")
        del losses
    return found
