"""Parameter groups of an optimiser: learning rate and weight decay by part of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(parts: Iterable[tuple[str, nn.Module, float]], weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's groups for the trainable parameters of some modules.

    parts: (name, module, learning rate) each. A part gives up to two groups: its parameters with
    weight decay, and those without. Biases (`bias` of a linear map, `bias_ih_l0` of an RNN) and
    the weights of LayerNorm and other norms (a class named ...Norm) have no weight decay.
    A group is {"params", "lr", "weight_decay", "name"}, with the name of its part.
    """
    groups = []
    for name, module, lr in parts:
        norms = [each for each in module.modules() if "norm" in type(each).__name__.lower()]
        of_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                own_name = key.rpartition(".")[2]
                is_bias = own_name.startswith("bias_") or own_name.endswith("bias")
                split[not is_bias and id(parameter) not in of_norms].append(parameter)
        for decays, parameters in split.items():
            if parameters:
                decay = weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": lr, "weight_decay": decay, "name": name})
    return groups
