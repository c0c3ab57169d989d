"""One encoder, one adapter stacked over the tasks, one head and loss per task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.config import OptimizerConfig, Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.adapters import build_adapter
from fastmtl.model.encoder import PackedBert, Pooler
from fastmtl.model.heads import build_head
from fastmtl.model.heads.embed import Recurrent
from fastmtl.model.losses import build_loss
from fastmtl.model.outputs import predictions, targets
from fastmtl.model.pooling import pooling

if TYPE_CHECKING:
    from fastmtl.surgery.task_gradients import TaskGradients


class MultiTaskModel(nn.Module):
    """Modules `encoder`, `adapter` (None without one) and `heads` (in the order of the recipe's tasks).

    Every module touches only its own parameters and all heads run on every batch, on no rows if need be, so that
    under ZeRO 3 all ranks gather the same parameters in the same order. Raises UserError, naming the key, for choices
    that do not fit together.
    """

    def __init__(self, recipe: Recipe, encoder: PackedBert) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = encoder
        self.adapter = build_adapter(recipe.adapter, encoder.config, recipe.task_names)
        heads, self.losses = [], []
        for name, task in recipe.tasks.items():
            try:
                heads.append(build_head(task, encoder.config.hidden_size, encoder.config.initializer_range))
                self.losses.append(build_loss(task))
                pooling(task.pooling)
                if task.pooling == "pooler":
                    encoder.use_pooler()
            except UserError as error:
                raise UserError(f"tasks.{name}: {error}") from None
        self.heads = nn.ModuleList(heads)
        encoder.requires_grad_(not recipe.encoder.freeze)

    @property
    def task_weights(self) -> dict[str, float]:
        """The recipe's fixed weights. The losses of `forward` are not multiplied by them."""
        return {name: task.weight for name, task in self.recipe.tasks.items()}

    def forward(
        self,
        batch: PackedBatch,
        task_grads: TaskGradients | None = None,
        *,
        returns: Literal["losses", "predictions"] = "losses",
    ) -> dict[str, Any]:
        """Losses of all tasks, (fp32 0-dim sum over the examples, their number), or predictions of the present ones.

        A task without examples gives (0, 0), a zero that its head computed from no rows: every rank then has the same
        graph, which ZeRO 3 needs to gather parameters collectively.
        task_grads: where the encoder's layers write task gradients while it is armed.
        Raises ValueError where losses are asked for and a task's examples have no labels.
        """
        results: dict[str, Any] = {}
        for index, (name, outputs) in enumerate(self._outputs(batch, task_grads).items()):
            task, labels, count = self.recipe.tasks[name], batch.labels[index], batch.counts[index]
            if returns == "predictions":
                if count:
                    results[name] = predictions(task, outputs)
            elif count == 0:
                results[name] = (outputs.sum(), 0)
            elif labels is None:
                raise ValueError(f"task '{name}': the batch has no labels for its examples")
            else:
                results[name] = (self.losses[index](outputs, targets(task, labels)).sum(), count)
        return results

    def predict(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Per task that has examples, in the order of its example_ids, fp32.

        classification: probabilities [E, C]; binary: probability of class 1 [E]; regression: score [E] in label
        units.
        """
        with torch.no_grad():
            return self(batch, returns="predictions")

    def shared_parameters(self) -> list[nn.Parameter]:
        """What gradient surgery merges: the encoder's parameters, none where it is frozen."""
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Those whose gradient has few rows that are not zero: the word embeddings."""
        weight = self.encoder.embeddings.word_embeddings.weight
        return [weight] if weight.requires_grad else []

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What belongs to tasks and keeps its own gradient: "adapters" (stacked [T, ...]) and "heads"."""
        adapters = [] if self.adapter is None else list(self.adapter.parameters())
        return {"adapters": adapters, "heads": list(self.heads.parameters())}

    def parameter_groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Trainable parameters for an optimiser: groups `encoder`, `adapters`, `heads`, with and without weight
        decay.

        Biases and the weights of LayerNorm do not decay. Keys: params, lr, weight_decay, name.
        """
        parts = [("encoder", self.encoder, config.lr), ("heads", self.heads, config.head_lr)]
        if self.adapter is not None:
            parts.insert(1, ("adapters", self.adapter, config.adapter_lr))
        groups = []
        for name, module, lr in parts:
            split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    split[not key.endswith(("bias", "LayerNorm.weight"))].append(parameter)
            for decays, parameters in split.items():
                if parameters:
                    decay = config.weight_decay if decays else 0.0
                    lr = config.lr if lr is None else lr
                    groups.append({"params": parameters, "lr": lr, "weight_decay": decay, "name": name})
        return groups

    def _outputs(self, batch: PackedBatch, task_grads: TaskGradients | None) -> dict[str, Tensor]:
        """Every head's outputs, float32 [E_t, num_outputs], E_t = 0 included."""
        hidden = self.encoder(batch, self.adapter, task_grads)
        pooled = {name: pooling(name)(hidden, batch) for name in self._poolings()}
        if "pooler" in pooled:
            assert isinstance(self.encoder.pooler, Pooler)
            pooled["pooler"] = self.encoder.pooler(pooled["pooler"], batch, task_grads)
        outputs = {}
        for index, (name, head) in enumerate(zip(self.recipe.task_names, self.heads, strict=True)):
            vectors = self._vectors(index, hidden, pooled, batch)
            pairs = batch.pairs[index]
            if self.recipe.tasks[name].pairs == "cross":
                outputs[name] = head(vectors, None).float()
                continue
            if pairs is None and len(vectors):
                raise UserError(f"tasks.{name}.pairs: bi, but its examples are single texts")
            first = batch.host.seq_offsets[index]
            u, v = (vectors, vectors) if pairs is None else (vectors[pairs[:, k] - first] for k in range(2))
            outputs[name] = head(u, v).float()
        return outputs

    def _poolings(self) -> list[str]:
        """Those that some task's head looks at."""
        tasks = zip(self.recipe.tasks.values(), self.heads, strict=True)
        return list(dict.fromkeys(task.pooling for task, head in tasks if not isinstance(head.embed, Recurrent)))

    def _vectors(self, index: int, hidden: Tensor, pooled: dict[str, Tensor], batch: PackedBatch) -> Tensor:
        """What u and v of a task are taken from, one row for each of its sequences."""
        start, stop = batch.host.seq_offsets[index : index + 2]
        embed, name = self.heads[index].get_submodule("embed"), self.recipe.task_names[index]
        if isinstance(embed, Recurrent):
            lengths = np.diff(batch.host.cu_seqlens[start : stop + 1]).tolist()
            return embed(hidden[slice(*batch.host.token_offsets[index : index + 2])], lengths)
        return embed(pooled[self.recipe.tasks[name].pooling][start:stop])
