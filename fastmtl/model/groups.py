"""Parameter groups of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(parts: Iterable[tuple[str, nn.Module, float]], weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters of parts (name, module, learning rate).

    Each part has up to two groups, with and without weight decay. Biases (`bias` of a linear map,
    `bias_ih_l0` of an RNN) and the weights of LayerNorm do not decay.
    Keys of a group: params, lr, weight_decay, name.
    """
    groups = []
    for name, module, lr in parts:
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                own_name = key.rpartition(".")[2]
                is_bias = own_name.startswith("bias_") or own_name.endswith("bias")
                split[not is_bias and not key.endswith("LayerNorm.weight")].append(parameter)
        for decays, parameters in split.items():
            if parameters:
                decay = weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": lr, "weight_decay": decay, "name": name})
    return groups
