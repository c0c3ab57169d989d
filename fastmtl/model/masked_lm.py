"""Masked language modelling (Devlin et al. 2019) with the output layer of transformers' classes.

logits = W LN(activation(A h + a)) + b, where h [d] is the hidden state of a masked token and W
[V, e] is the encoder's table of word embeddings. `Family.masked_lm` describes each class's layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from fastmtl.config import MLM, OptimizerConfig
from fastmtl.data.masking import MaskedBatch
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.family import MaskedLm
from fastmtl.model.encoder.names import base_name
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.encoder.weights import load_exactly, read_weights
from fastmtl.model.groups import parameter_groups

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


class MaskedLanguageModel(nn.Module):
    """Model of one task, masked language modelling, with the loss `mlm`.

    encoder: not copied, so that training also changes the model from which it comes.
    """

    def __init__(self, encoder: PackedEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = OutputLayer(encoder.settings, FAMILIES[encoder.config.model_type].masked_lm)

    def forward(self, batch: MaskedBatch, task_grads: Sink | None = None) -> dict[str, tuple[Tensor, int]]:
        """Return {"mlm": (fp32 0-dim sum of the masked tokens' cross-entropies, their number)}.

        task_grads: not used, since one loss needs no gradient per task, and the output layer's
        gradient for the word embeddings would not reach the sink.
        """
        hidden = self.encoder(batch.batch)
        words = self.encoder.words
        logits = self.head(hidden.index_select(0, batch.positions), words)
        loss = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        return {MLM: (loss, len(batch.targets))}

    @property
    def task_weights(self) -> dict[str, float]:
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Return []: no shared parameter has a gradient of mostly zero rows.

        The output layer gives every row of the word embeddings a gradient.
        """
        return []

    def parameter_groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Return the optimiser's groups, named `encoder` and `heads` (see groups.py)."""
        head_lr = config.lr if config.head_lr is None else config.head_lr
        parts = [("encoder", self.encoder, config.lr), ("heads", self.head, head_lr)]
        return parameter_groups(parts, config.weight_decay, config.layer_decay)


class OutputLayer(nn.Module):
    """Map hidden states to logits of the vocabulary.

    described: the layer of the encoder's family.
    """

    def __init__(self, settings: EncoderSettings, described: MaskedLm) -> None:
        super().__init__()
        self.described = described
        self.transform = Transform(settings, described)
        self.bias = nn.Parameter(torch.zeros(settings.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Map hidden states [M, d] and word embeddings [V, e] to logits [M, V]."""
        return functional.linear(self.transform(hidden), words, self.bias)


class Transform(nn.Module):
    """Layer before the logits: LN(activation(A h + a))."""

    def __init__(self, settings: EncoderSettings, described: MaskedLm) -> None:
        super().__init__()
        size, biased = settings.embedding_size, described.biased
        self.dense = nn.Linear(settings.hidden_size, size, bias=biased)
        self.LayerNorm = nn.LayerNorm(size, eps=settings.layer_norm_eps, bias=biased)
        self.activation = ACT2FN[described.activation or settings.hidden_act]
        nn.init.normal_(self.dense.weight, std=settings.initializer_range)
        if biased:
            nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states h [M, d] of M masked tokens to [M, e]."""
        return self.LayerNorm(self.activation(self.dense(hidden)))


def load_output_layer(head: OutputLayer, directory: Path) -> bool:
    """Load the output layer's weights from a Hugging Face directory.

    Return True if they were loaded, False if the directory has none of them.
    Raises UserError if the directory has only some of them.
    """
    tensors = {base_name(name): tensor for name, tensor in read_weights(directory).items()}
    for described in (head.described, head.described.other):
        names = {} if described is None else _names_in_files(head, described)
        found = {name: tensors[name] for name in names.values() if name in tensors}
        if found:
            load_exactly(head, found, str(directory), names)
            return True
    return False


def _names_in_files(head: OutputLayer, described: MaskedLm) -> dict[str, str]:
    """Return {name of a tensor of the layer: its name in files}."""
    files = {"transform.dense": described.dense, "transform.LayerNorm": described.norm}
    names = {}
    for name in head.state_dict():
        module, _, parameter = name.rpartition(".")
        names[name] = f"{files[module]}.{parameter}" if module else described.bias
    return names
