"""A MultiTaskModel on padded texts, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmtl.model.encoder.pooler import Pooler
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.padded.encoder import PaddedEncoder
from fastmtl.model.padded.heads import PaddedHead


class PaddedModel(nn.Module):
    """The tasks of a model that share one run of the encoder.

    model: a model in evaluation mode, whose weights are shared. tasks: names of the tasks; more
    than one only if `model.runs_encoder_once`. merge_lora: add the LoRA to the encoder's weights.

    Inputs, B texts padded on the right to L tokens: input_ids, attention_mask (1 for a token, 0
    for padding) and, if `takes_types`, token_type_ids, int64 [B, L]; if `takes_pairs`, pairs, int64
    [P, 2], the numbers of the texts that a task with `pairs: bi` compares.
    Outputs, float32, "<task>.logits" and for tasks with one prediction per text or pair
    "<task>.predictions": see fastmtl.model.heads.outputs, with E = B, or P for `pairs: bi`. Types
    `tokens` and `span` have logits [B, L, C] and [B, L, 2] of every token, `choice` and `ranking`
    [B, 1] or [P, 1].
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[str], *, merge_lora: bool = False) -> None:
        super().__init__()
        assert len(tasks) == 1 or model.runs_encoder_once
        self.tasks = list(tasks)
        numbers = [model.recipe.task_names.index(name) for name in tasks]
        task = None if model.runs_encoder_once else numbers[0]
        self.encoder = PaddedEncoder(model.encoder, model.adapter, model.lora, task, merge=merge_lora)
        pooler = model.encoder.pooler if isinstance(model.encoder.pooler, Pooler) else None
        configs = [model.recipe.tasks[name] for name in tasks]
        self.heads = nn.ModuleList(
            PaddedHead(config, model.heads[number], pooler) for config, number in zip(configs, numbers, strict=True)
        )
        self.takes_types = self.encoder.takes_types
        self.takes_pairs = any(config.pairs == "bi" for config in configs)

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs, in the order of `forward`'s arguments."""
        optional = {"token_type_ids": self.takes_types, "pairs": self.takes_pairs}
        return ["input_ids", "attention_mask", *(name for name, taken in optional.items() if taken)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {output: tensor} for the inputs that the class describes."""
        hidden, inside = self.encoder(input_ids, attention_mask, token_type_ids), attention_mask.bool()
        found: dict[str, Tensor] = {}
        for name, head in zip(self.tasks, self.heads, strict=True):
            found |= {f"{name}.{output}": value for output, value in head(hidden, inside, pairs).items()}
        return found
