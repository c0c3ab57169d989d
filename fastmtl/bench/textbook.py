"""PCGrad as it is usually written: a padded BertModel, one backward per task, pairwise projections.

This is the reference for fastmtl's gradients and speed; it uses nothing of fastmtl. It is lean:
each task's graph is freed before the next task's forward, and nothing is copied that the algorithm
does not require. T tasks, P shared parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class PaddedBatch:
    """The B texts of one task, padded to the L tokens of the longest.

    input_ids, attention_mask, token_type_ids: int64 [B, L]. labels: [B], int64 for classes, float32
    otherwise.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class TaskBatch(Protocol):
    """The rows of one task. labels: [B], int64 for classes, float32 otherwise."""

    @property
    def labels(self) -> Tensor: ...


class TaskModel(nn.Module):
    """An encoder, and for each task a linear head on one vector [width] of a row.

    kinds: for each task "classification", "binary" or "regression", and the number of the head's
    outputs.
    """

    def __init__(self, encoder: nn.Module, width: int, kinds: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.kinds = [kind for kind, _ in kinds]
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(width, outputs) for _, outputs in kinds)

    def features(self, batch: Any) -> Tensor:
        """Return the heads' input of each row, [B, width]."""
        raise NotImplementedError

    def loss(self, task: int, features: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean loss of a task over its batch, a scalar in float32 or better."""
        outputs = self.heads[task](features)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.kinds[task] == "classification":
            return functional.cross_entropy(outputs, batch.labels)
        if self.kinds[task] == "binary":
            return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), batch.labels)
        return functional.mse_loss(outputs.squeeze(1), batch.labels)

    def losses(self, features: Sequence[Tensor], batches: Sequence[TaskBatch]) -> list[Tensor]:
        """Return the mean loss of every task."""
        return [self.loss(task, *pair) for task, pair in enumerate(zip(features, batches, strict=True))]


class PaddedModel(TaskModel):
    """A model of transformers, and for each task a linear head on the first token's hidden state.

    Token types are given to an encoder that has a table of them.
    """

    encoder: PreTrainedModel

    def __init__(self, config: PretrainedConfig, kinds: Sequence[tuple[str, int]]) -> None:
        self._has_types = getattr(config, "type_vocab_size", 0) > 0
        kind: Any = MODEL_MAPPING[type(config)]
        pools = "add_pooling_layer" in inspect.signature(kind).parameters
        options = {"add_pooling_layer": False} if pools else {}
        super().__init__(AutoModel.from_config(config, **options), config.hidden_size, kinds)

    def features(self, batch: PaddedBatch) -> Tensor:
        """Return the last hidden state of each text's first token, [B, hidden]."""
        types = {"token_type_ids": batch.token_type_ids} if self._has_types else {}
        encoded = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types)
        return encoded.last_hidden_state[:, 0]


def step(
    model: TaskModel, batches: Sequence[TaskBatch], features: Callable[[], Sequence[Tensor]] | None = None
) -> None:
    """Run one step. Write the encoder's merged gradient and each head's own gradient to `.grad`.

    features: as for task_gradients.
    """
    model.zero_grad()
    merged = pcgrad(task_gradients(model, batches, features))
    parameters = trained(model.encoder)
    pieces = merged.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view(parameter.shape)


def task_gradients(
    model: TaskModel, batches: Sequence[TaskBatch], features: Callable[[], Sequence[Tensor]] | None = None
) -> list[Tensor]:
    """Return the encoder's gradient of each task's loss: a list of T tensors [P].

    The gradients of the heads are left in `.grad`. features: runs one forward for tasks with the
    same rows, and returns each task's features; None for a forward per task.
    """
    gradients, of_tasks = [], None if features is None else features()
    for task, batch in enumerate(batches):
        model.encoder.zero_grad()
        loss = model.loss(task, model.features(batch) if of_tasks is None else of_tasks[task], batch)
        loss.backward(retain_graph=of_tasks is not None and task + 1 < len(batches))
        gradients.append(torch.cat([_gradient(p).flatten() for p in trained(model.encoder)]))
    return gradients


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def pcgrad(gradients: Sequence[Tensor], order: Tensor | None = None) -> Tensor:
    """Return PCGrad's merged gradient [P] of the T gradients [P]: Yu et al. 2020, Algorithm 1.

    Each gradient is projected so that it does not conflict with the others; then all are added.
    order: int64 [T, T]. Gradient i is projected against those of the tasks in row i, in this order;
    task i itself is skipped. By default torch's global generator draws the order.
    """
    merged = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        projected = gradient.clone()
        others = torch.randperm(len(gradients)) if order is None else order[i]
        for j in others.tolist():
            if j == i:
                continue
            inner = projected @ gradients[j]
            if inner < 0:
                projected -= inner / (gradients[j] @ gradients[j]) * gradients[j]
        merged += projected
    return merged
