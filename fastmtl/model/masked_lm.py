"""Masked language modelling on the encoder (Devlin et al. 2019), with the output layer of BertForMaskedLM.

logits = W LN(gelu(A h + a)) + b for the hidden states h of the masked tokens; W are the word embeddings themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig
from transformers.activations import ACT2FN

from fastmtl.config import MLM, OptimizerConfig
from fastmtl.data.masking import MaskedBatch
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.encoder.bert_files import base_name
from fastmtl.model.encoder.weights import load_exactly, read_weights
from fastmtl.model.groups import parameter_groups

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink

PREFIX = "cls.predictions."


class MaskedLanguageModel(nn.Module):
    """The encoder, shared with whoever gave it, and the output layer. All texts have one loss, `mlm`."""

    def __init__(self, encoder: PackedBert) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = OutputLayer(encoder.config)

    def forward(self, batch: MaskedBatch, task_grads: Sink | None = None) -> dict[str, tuple[Tensor, int]]:
        """{"mlm": (fp32 0-dim sum of the masked tokens' cross-entropies, their number)}. task_grads is left alone: the
        word embeddings are used past it, and there is one loss only.
        """
        hidden = self.encoder(batch.batch)
        words = self.encoder.embeddings.word_embeddings.weight
        logits = self.head(hidden.index_select(0, batch.positions), words)
        loss = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        return {MLM: (loss, len(batch.targets))}

    @property
    def task_weights(self) -> dict[str, float]:
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def sparse_parameters(self) -> list[nn.Parameter]:
        """None: the gradient of the word embeddings has no row that is zero here."""
        return []

    def parameter_groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Groups `encoder` and `heads`."""
        head_lr = config.lr if config.head_lr is None else config.head_lr
        return parameter_groups(
            [("encoder", self.encoder, config.lr), ("heads", self.head, head_lr)], config.weight_decay
        )


class OutputLayer(nn.Module):
    """Names are those below BertForMaskedLM's `cls.predictions`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """[M, d], [vocabulary, d] -> logits [M, vocabulary]."""
        return functional.linear(self.transform(hidden), words, self.bias)


class Transform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[M, d] -> [M, d]."""
        return self.LayerNorm(self.activation(self.dense(hidden)))


def load_output_layer(head: OutputLayer, directory: Path) -> bool:
    """Puts the `cls.predictions` of a directory's weights into the layer; False, and nothing done, where it has none.

    Raises UserError for a layer that is not whole.
    """
    tensors = {base_name(name): tensor for name, tensor in read_weights(directory).items()}
    ours = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX) and ".decoder." not in name}
    found = {name.removeprefix(PREFIX): tensor for name, tensor in ours.items()}
    if not found:
        return False
    load_exactly(head, found, f"{directory}: {PREFIX}*")
    return True
