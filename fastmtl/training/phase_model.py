"""The model of a phase: its trained parts, and the weights of earlier phases."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastmtl.config import MLM
from fastmtl.engine.distributed import Ranks
from fastmtl.errors import UserError
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.pretrained import encoder_directory, load_encoder
from fastmtl.model.lora.start import load_start
from fastmtl.model.masked_lm import MaskedLanguageModel, load_output_layer
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.task_weights import read_task_weights, take_over
from fastmtl.training.phases import Phase


class PhaseModel:
    """The model of a phase on the CPU.

    model: encoder, adapters and heads of the phase's tasks. New weights are drawn from the phase's
    seed, so they are equal on all ranks. trained: the module that the engine trains; it is `model`,
    or with `objective: mlm` a masked language model with the same encoder. notes: lines for the
    user. Raises UserError for settings that do not fit together, and if nothing is trained.
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        torch.manual_seed(phase.recipe.seed)
        self.model = MultiTaskModel(phase.recipe, load_encoder(phase.recipe.encoder))
        self.notes = [self.model.encoder.note] if self.model.encoder.note and not phase.index else []
        if self.model.lora is not None:
            load_start(self.model.lora, phase.recipe)
        parts = ("adapters", self.model.adapter), ("adapters", self.model.lora), ("heads", self.model.heads)
        for part, module in parts:
            if module is not None and part not in phase.parts:
                module.requires_grad_(False)
        self.trained: MultiTaskModel | MaskedLanguageModel = self.model
        if phase.objective == MLM:
            if not isinstance(self.model.encoder, PackedEncoder):
                raise UserError(
                    f"phases.{phase.index} ({phase.name}): objective: mlm needs a packed encoder, and "
                    f"encoder.implementation: {phase.recipe.encoder.implementation} runs transformers' own modules"
                )
            self.trained = MaskedLanguageModel(self.model.encoder)
            if not load_output_layer(self.trained.head, encoder_directory(phase.recipe.encoder.path)):
                self.notes.append("the encoder has no output layer for masked words: a new one is trained along")
        if not any(parameter.requires_grad for parameter in self.trained.parameters()):
            where = "" if phase.name is None else f"phases.{phase.index} ({phase.name}): "
            raise UserError(f"{where}there is nothing to train: the encoder is frozen, the rest has no parameters")

    @property
    def least_saved(self) -> int:
        """The bytes that a checkpoint and model/ take together, at least.

        They contain all weights in 16 and in 32 bits, and Adam's two moments of the trained weights
        in 32 bits.
        """
        trained = sum(tensor.numel() for tensor in self.trained.parameters() if tensor.requires_grad)
        return (2 + 4) * sum(tensor.numel() for tensor in self.trained.parameters()) + 8 * trained

    def take_over(self, directory: Path, ranks: Ranks) -> None:
        """Load the weights of earlier phases from a `model/` directory, which only rank 0 reads.

        Every rank calls this method. Weights that the directory lacks stay as they are; a note
        lists them.
        """
        new: list[str] = []
        if ranks.is_main:
            weights, _ = read_task_weights(directory)
            new = take_over(self.model, weights)
        for tensor in self.model.state_dict().values():
            ranks.broadcast(tensor)
        if new:
            self.notes.append(f"new in this phase: {', '.join(new)}")

    def whole(self, gathered: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the state dict of `model`, given the complete state dict of `trained`.

        gathered: the result of `gathered_state_dict`; for None, on ranks other than 0, None is
        returned.
        """
        if gathered is None or self.trained is self.model:
            return gathered
        return {name: gathered.get(name, tensor) for name, tensor in self.model.state_dict().items()}
