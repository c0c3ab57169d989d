"""Parameter groups of an optimiser: learning rate and weight decay by part of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastmtl.model.encoder.base import Encoder


def parameter_groups(
    parts: Iterable[tuple[str, nn.Module, float]], weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return the optimiser's groups for the trainable parameters of some modules.

    parts: (name, module, learning rate) each. A part gives up to two groups: its parameters with
    weight decay, and those without. Biases (`bias` of a linear map, `bias_ih_l0` of an RNN) and
    the weights of LayerNorm and other norms (a class named ...Norm) have no weight decay.
    A group is {"params", "lr", "weight_decay", "name"}, with the name of its part.
    layer_decay: the parameters of an encoder that have k layers above them get the learning rate
    lr layer_decay^k, and for k > 0 groups of their own, named encoder-k. None: all get lr.
    """
    groups = []
    for name, module, lr in parts:
        above = module.layers_above() if layer_decay is not None and isinstance(module, Encoder) else {}
        norms = [each for each in module.modules() if "norm" in type(each).__name__.lower()]
        of_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
        split: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for full_name, parameter in module.named_parameters():
            if parameter.requires_grad:
                own_name = full_name.rpartition(".")[2]
                is_bias = own_name.startswith("bias_") or own_name.endswith("bias")
                key = above.get(id(parameter), 0), is_bias or id(parameter) in of_norms
                split.setdefault(key, []).append(parameter)
        for (layers, spared), parameters in sorted(split.items()):
            groups.append(
                {
                    "params": parameters,
                    "lr": lr * (layer_decay or 1.0) ** layers,
                    "weight_decay": 0.0 if spared else weight_decay,
                    "name": f"{name}-{layers}" if layers else name,
                }
            )
    return groups
