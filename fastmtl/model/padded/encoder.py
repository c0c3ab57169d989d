"""An encoder on padded texts: transformers' own module with the weights of fastmtl's encoder.

Adapters and LoRAs enter the module through hooks, which torch.export traces like all other code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from os.path import commonprefix
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastmtl.model.adapters.adapter import Adapter
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.model.lora.lora import Lora
from fastmtl.model.padded.adapters import LoraTerm, task_term, task_top

# Arguments of the modules of transformers for token types and positions.
_TYPES, _POSITIONS = "token_type_ids", "position_ids"


class PaddedEncoder(nn.Module):
    """Map padded texts, input_ids [B, L], to hidden states [B, L, d].

    encoder: the encoder, whose weights are shared. adapter, lora: those of the model, or None.
    task: number of the task whose adapter, top and LoRA the module has; None if the model has none
    of one task. merge: add the LoRA to the weights instead of computing its terms.
    Attribute takes_types: True if token types change the hidden states.
    """

    def __init__(
        self, encoder: Encoder, adapter: Adapter | None, lora: Lora | None, task: int | None, *, merge: bool
    ) -> None:
        super().__init__()
        self.module = _module_of(encoder)
        takes = inspect.signature(self.module.forward).parameters
        self.takes_types = _TYPES in takes and encoder.settings.type_vocab_size > 1
        # transformers would count RoBERTa's positions from the tokens that are not padding, and a
        # text may contain the padding's token.
        own_positions = isinstance(encoder, PackedEncoder) and encoder.settings.first_position > 0
        self.first_position = encoder.settings.first_position if own_positions and _POSITIONS in takes else None
        self.top: nn.Module | None = None
        self.terms, self.lora_terms = nn.ModuleList(), nn.ModuleList()
        # Hooks read these. torch.export allows no change of a tensor among a module's attributes.
        self._now = _Forward()
        if lora is not None:
            assert isinstance(encoder, PackedEncoder)
            self._add_lora(encoder, lora, task if lora.by_task else None, merge=merge)
        if adapter is not None:
            assert isinstance(encoder, PackedEncoder) and task is not None
            self._add_adapter(encoder, adapter, task)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Return the hidden states [B, L, d]; those of padding have no meaning.

        input_ids, attention_mask (1 for a token, 0 for padding), token_type_ids: int64 [B, L],
        padded on the right. token_type_ids: None unless `takes_types`.
        """
        inside = attention_mask.bool()
        self._now.inside, self._now.runs = inside, {}
        inputs: dict[str, Tensor | None] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_types:
            inputs[_TYPES] = token_type_ids
        if self.first_position is not None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device) + self.first_position
            inputs[_POSITIONS] = positions.expand_as(input_ids)
        hidden = self.module(**inputs, return_dict=True).last_hidden_state
        self._now.inside = None
        return hidden if self.top is None else self.top(hidden, inside)

    def _add_lora(self, encoder: PackedEncoder, lora: Lora, task: int | None, *, merge: bool) -> None:
        for name in lora.pairs:
            linear = self.module.get_submodule(_there(encoder, f"{name}.weight").removesuffix(".weight"))
            assert isinstance(linear, nn.Linear)
            if merge:
                a, b = lora.matrices(name, task)
                linear.weight = nn.Parameter(torch.add(linear.weight.detach(), b @ a, alpha=lora.config.scale))
            else:
                self.lora_terms.append(LoraTerm(lora, name, task))
                linear.register_forward_hook(_adding(self.lora_terms[-1]))

    def _add_adapter(self, encoder: PackedEncoder, adapter: Adapter, task: int) -> None:
        layers = list(encoder.layers)
        terms: dict[nn.Module, dict[int, nn.Module]] = {layer: {} for layer in layers}
        for number in adapter.layers:
            self.terms.append(task_term(adapter, number, task))
            terms[layers[number]][number] = self.terms[-1]
        names = {module: name for name, module in encoder.named_modules()}
        for layer, of_layer in terms.items():
            if of_layer:
                numbers = [number for number, one in enumerate(layers) if one is layer]
                self._attach(encoder, names[layer], numbers, of_layer)
        self.top = None if adapter.top is None else task_top(adapter.top, task)

    def _attach(self, encoder: PackedEncoder, name: str, numbers: list[int], terms: dict[int, nn.Module]) -> None:
        """Add TS(h) to a layer's last sum: before its last LayerNorm, with pre-norm to its output.

        name: the layer's in the encoder. numbers: of the layers that have its weights, in their
        order. terms: {number: TS} of those with an adapter.
        """
        parameters = [_there(encoder, f"{name}.{own}") for own, _ in encoder.get_submodule(name).named_parameters()]
        common = commonprefix([parameter.split(".") for parameter in parameters])
        layer = self.module.get_submodule(".".join(common))
        held: list[Tensor | None] = []
        now = self._now

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            run = now.runs.get(layer, 0)
            now.runs[layer] = run + 1
            term = terms.get(numbers[run])
            held.append(None if term is None else term(hidden, now.inside))

        def add(hidden: Tensor) -> Tensor:
            term = held.pop()
            return hidden if term is None else hidden + term

        layer.register_forward_pre_hook(before, with_kwargs=True)
        if encoder.pre_norm:
            layer.register_forward_hook(lambda _, args, output: _first_changed(output, add))
        else:
            norm = _there(encoder, f"{name}.output.LayerNorm.weight").removesuffix(".weight")
            self.module.get_submodule(norm).register_forward_pre_hook(lambda _, args: (add(args[0]), *args[1:]))


class _Forward:
    """State of a forward. inside: as in adapters.py. runs: {layer: times that it has run}."""

    inside: Tensor | None = None
    runs: dict[nn.Module, int]


def _adding(term: nn.Module) -> Callable[..., Tensor]:
    return lambda _, args, output: output + term(args[0])


def _first_changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a layer's output with its hidden states changed: a tensor, or the first of a tuple."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def _there(encoder: PackedEncoder, name: str) -> str:
    """Return the name of a parameter of the encoder in transformers' module."""
    return FAMILIES[encoder.config.model_type].file_name(name)


def _module_of(encoder: Encoder) -> nn.Module:
    """Return transformers' module with the encoder's weights, in evaluation mode, for own hooks."""
    if isinstance(encoder, TransformersEncoder):
        return encoder.model
    assert isinstance(encoder, PackedEncoder)
    family = FAMILIES[encoder.config.model_type]
    kind = getattr(transformers, family.architecture)
    without = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    config = copy.deepcopy(encoder.config)
    config.chunk_size_feed_forward = 0
    with torch.random.fork_rng(devices=[]):
        module = kind._from_config(config, **without)
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("pooler.")}
    loaded = module.load_state_dict(
        {family.file_name(name): one for name, one in weights.items()}, strict=False, assign=True
    )
    left = [name for name in loaded.missing_keys if name in dict(module.named_parameters())]
    assert not left and not loaded.unexpected_keys, (left, loaded.unexpected_keys)
    return module.eval()
