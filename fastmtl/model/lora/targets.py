"""The linear layers of an encoder that `lora.targets` and `lora.layers` choose."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastmtl.config import LoraConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.layers import Projection, TaskLinear

ALL = "all-linear"


class Place(NamedTuple):
    """A linear layer with a LoRA.

    name: its name in the encoder. inner: its name in its layer. number: its number there, from 0.
    """

    name: str
    inner: str
    number: int


def find_places(config: LoraConfig, encoder: PackedEncoder) -> list[Place]:
    """Return the linear layers that get a LoRA, in the encoder's order.

    A target is one of fastmtl's names, which every family of encoders maps to its modules, or the
    end of a module's name in transformers' model, as in PEFT: `dense` chooses all modules named
    `dense`, and `output.dense` those inside a module `output`.
    Raises UserError, naming the key, for targets and layers that the encoder does not have.
    """
    names, targets = {module: name for name, module in encoder.named_modules()}, config.targets
    found, chosen = list[Place](), set[str]()
    known = dict.fromkeys([*encoder.linears, ALL])
    for layer in _layers(config.layers, encoder):
        places = [Place(f"{names[layer]}.{name}", name, i) for i, name in enumerate(linears_of(layer))]
        for place in places:
            fitting = [ALL] if targets == ALL else [name for name in targets if _fits(name, place, encoder)]
            found += [place] if fitting else []
            chosen.update(fitting)
        known |= dict.fromkeys(place.inner for place in places)
    for target in [] if targets == ALL else targets:
        if target not in chosen:
            raise UserError(f"lora.targets: {unknown_name('linear layer', target, known)}")
    if not found:
        raise UserError("lora.targets: name at least one, as in [query, value], or all-linear")
    return found


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return {name in the layer: module} of the linear layers in a layer that can have a LoRA."""
    return {name: part for name, part in layer.named_modules() if isinstance(part, TaskLinear | Projection)}


def transformers_name(encoder: PackedEncoder, module: str) -> str:
    """Return the name that a linear module of the encoder has in transformers' model."""
    file_name = FAMILIES[encoder.config.model_type].file_name
    return file_name(f"{module}.weight").removesuffix(".weight")


def _fits(target: str, place: Place, encoder: PackedEncoder) -> bool:
    """Return True if a name in lora.targets chooses this linear layer."""
    if target in encoder.linears:
        return place.inner == encoder.linears[target]
    return f".{transformers_name(encoder, place.name)}".endswith(f".{target}")


def _layers(chosen: list[int] | None, encoder: PackedEncoder) -> list[nn.Module]:
    """Return the chosen layers, each module once."""
    every = list(encoder.layers)
    if chosen is None:
        return list(dict.fromkeys(every))
    wrong = [number for number in chosen if not 0 <= number < len(every)]
    if wrong:
        raise UserError(f"lora.layers: no layer {wrong[0]}: the encoder's layers are 0 to {len(every) - 1}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"lora.layers: {chosen}: name at least one layer, and each once")
    if len(set(every)) < len(every):
        raise UserError("lora.layers: the layers of this encoder share their weights: leave lora.layers out")
    return [every[number] for number in sorted(chosen)]
