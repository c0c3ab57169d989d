"""The sizes of a model's LoRA, for the memory model."""

from __future__ import annotations

from dataclasses import dataclass

from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.multitask import MultiTaskModel


@dataclass(frozen=True)
class LoraShape:
    """Sizes of a LoRA.

    sites: for each linear layer with a LoRA in a layer, the site that it reads (SITES) and its
    numbers of inputs and outputs. first: the number of the first layer with a LoRA. layers: the
    number of layers with one. numbers: of all weights. shared: all tasks have the same.
    """

    rank: int
    sites: tuple[tuple[str, int, int], ...]
    first: int
    layers: int
    numbers: int
    dropout: bool
    shared: bool

    @property
    def largest(self) -> int:
        """The number of weights in the largest matrix."""
        return self.rank * max(max(inner, outer) for _, inner, outer in self.sites)


# A linear layer by its name in lora.targets -> the tensor of a layer that it reads: the input of
# the layer, the output of attention, that of the first norm, and that of the activation.
SITES = {"attention_output": "attended", "intermediate": "normed", "output": "activated"}
LAYER_INPUT = "input"  # of query, key and value


def lora_shape(model: MultiTaskModel) -> LoraShape | None:
    """Return the sizes of the model's LoRA; every layer with one has the same."""
    encoder = model.encoder
    if model.lora is None:
        return None
    assert isinstance(encoder, PackedEncoder)
    names = {module: name for name, module in encoder.named_modules()}
    targets = {inner: target for target, inner in encoder.linears.items()}
    carrying = {}
    for number, layer in enumerate(encoder.layers):
        start = f"{names[layer]}."
        inside = [name.removeprefix(start) for name in model.lora.pairs if name.startswith(start)]
        if inside:
            carrying[number] = [(name, model.lora.pairs[start + name]) for name in inside]
    first = min(carrying)
    sites = tuple(
        (SITES.get(targets.get(name, name), LAYER_INPUT), pair.lora_A.shape[-1], pair.lora_B.shape[-2])
        for name, pair in carrying[first]
    )
    config = model.lora.config
    assert config.rank is not None
    numbers = sum(parameter.numel() for parameter in model.lora.parameters())
    return LoraShape(config.rank, sites, first, len(carrying), numbers, config.dropout > 0, config.tasks == "shared")
