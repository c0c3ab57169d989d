"""The multi-task model: an encoder for all tasks, and an adapter, a head and a loss per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.config import OptimizerConfig, Recipe, TaskConfig
from fastmtl.config.types import TYPES
from fastmtl.data.packed_batch import PackedBatch, Units
from fastmtl.errors import UserError
from fastmtl.model.adapters import build_adapter
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.pooler import Pooler
from fastmtl.model.examples import Examples, HeadBatch, RecordedHeads, Vectors
from fastmtl.model.groups import parameter_groups
from fastmtl.model.heads import build_head
from fastmtl.model.heads.embed import Recurrent
from fastmtl.model.heads.outputs import kind, predictions, targets
from fastmtl.model.heads.pooling import pooling
from fastmtl.model.lora import build_lora
from fastmtl.model.losses.smart import Smart, SmartModel
from fastmtl.model.losses.task_loss import TaskLoss, build_loss
from fastmtl.model.losses.weighting import LEARNED, add_learned_weight, batch_weights, check_weighting
from fastmtl.model.losses.weighting.batch_weights import weighted
from fastmtl.model.precision import precise
from fastmtl.model.types import UNIT_TYPES
from fastmtl.surgery.random_state import RandomState

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


class MultiTaskModel(SmartModel):
    """A model with one encoder for all tasks of a recipe.

    Modules: `encoder`; `adapter`, whose parameters are stacked over the tasks, or None; `lora`, for
    all tasks or stacked over them, or None; `heads`, one for each task, in the order of the recipe.
    Every module uses only its own parameters, and every batch runs all heads, with no rows for a
    task that has no examples. Under ZeRO 3 all ranks therefore gather the same parameters in the
    same order.
    Attribute batch_weights: weights of the losses that depend on the micro-batch, or None.
    Attribute recorded_heads: replays recordings of heads and losses in training, as CUDA graphs do;
    None by default.
    Raises UserError, naming the key, for settings that do not fit together.
    """

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = encoder
        encoder.check_recipe(recipe)
        self.adapter = build_adapter(recipe.adapter, encoder.settings, recipe.task_names)
        heads, self.losses = [], []
        autocast = recipe.deepspeed.get("torch_autocast", {}).get("enabled")
        for name, task in recipe.tasks.items():
            try:
                heads.append(build_head(task, encoder.settings.hidden_size, encoder.settings.initializer_range))
                self.losses.append(build_loss(task))
                if task.mnr.cached and autocast:
                    raise UserError(
                        "mnr.cached: its first pass runs without deepspeed.torch_autocast; use precision: bf16"
                    )
                _check_trained(task, heads[-1], self.losses[-1])
                pooling(task.pooling)
                if task.pooling == "pooler":
                    encoder.use_pooler()
            except UserError as error:
                raise UserError(f"tasks.{name}: {error}") from None
            add_learned_weight(recipe, heads[-1], squared_error=kind(task) == "score")
        check_weighting(recipe)
        self.batch_weights = batch_weights(recipe)
        self.heads = nn.ModuleList(heads)
        self.lora = build_lora(recipe.lora, encoder, len(recipe.tasks))  # last: heads begin as without it
        self.smart = Smart(recipe) if recipe.smart.used else None
        if recipe.encoder.freeze:
            encoder.requires_grad_(False)
        self.recorded_heads: RecordedHeads | None = None
        if recipe.encoder.layer_norm == "apex" and recipe.gradient.method != "sum" and not recipe.encoder.freeze:
            raise UserError(
                "encoder.layer_norm: apex gives no gradient per task, which gradient.method: "
                f"{recipe.gradient.method} needs: use encoder.layer_norm: fastmtl or gradient.method: sum"
            )

    @property
    def hidden_size(self) -> int:
        return self.encoder.settings.hidden_size

    @property
    def task_weights(self) -> dict[str, float]:
        """{task: fixed weight of its loss}, from the recipe. `forward` does not multiply by it."""
        return {name: task.weight for name, task in self.recipe.tasks.items()}

    def forward(
        self,
        batch: PackedBatch,
        task_grads: Sink | None = None,
        *,
        returns: Literal["losses", "predictions"] = "losses",
    ) -> dict[str, Any]:
        """Return the losses of all tasks, or the predictions of the tasks that have examples.

        returns: "losses" for {task: (fp32 0-dim sum over its loss terms, number of loss terms)},
        "predictions" for the result of `predict`.
        A task without examples has the loss 0, which its head computes from no rows. All ranks then
        have the same autograd graph; ZeRO 3 needs this, since it gathers parameters collectively.
        task_grads: sink for the encoder's gradients per task; used while it is armed.
        Raises ValueError if a loss needs labels that the batch does not have.
        """
        if batch.cached is not None:
            batch.cached.random.restore()
        terms = None
        if self.smart is not None and self.smart.active and returns == "losses":
            begun = RandomState.capture(batch.input_ids.device)
            terms = partial(self.smart.terms, self, batch, task_grads, begun=begun)
        vectors, rest = self._vectors(batch, task_grads), HeadBatch.of(batch)
        if returns == "predictions":
            tasks = zip(self.recipe.tasks.items(), self._examples(vectors, rest), batch.counts, strict=True)
            heads = zip(tasks, self.heads, strict=True)
            return {name: predictions_of(task, found, head) for ((name, task), found, count), head in heads if count}
        recorded = self.recorded_heads if torch.is_grad_enabled() and terms is None else None
        losses = None if recorded is None else recorded.run(vectors, rest)
        if losses is None:
            losses = self.losses_of(vectors, rest, terms)
        if self.batch_weights is not None and torch.is_grad_enabled():
            losses = weighted(losses, batch.loss_terms, self.batch_weights)
        return dict(zip(self.recipe.task_names, zip(losses, batch.loss_terms, strict=True), strict=True))

    def predict(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Return {task: fp32 predictions} for each task that has examples, without gradients.

        The rows have the order of the batch's example_ids.
        classification: probabilities [E, C]; binary: the probability of class 1 [E]; regression:
        the score [E] in label units; types whose head scores units: [U, ...], as in
        fastmtl.model.types.
        """
        with torch.no_grad():
            return self(batch, returns="predictions")

    @property
    def runs_encoder_once(self) -> bool:
        """True if all tasks get the same hidden states: no layer has weights of one task."""
        return self.adapter is None and (self.lora is None or self.recipe.lora.shared)

    def predict_for_tasks(self, batch: PackedBatch, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return {task: predictions} of the same texts, of one run of the encoder.

        batch: all texts belong to one task; they are encoded alike for each of `tasks`. Only if
        `runs_encoder_once`. The predictions are those of `predict`.
        """
        assert self.runs_encoder_once
        found = {}
        with torch.no_grad():
            hidden = self.encoder(batch, None, None, None, self.lora)
            for name in tasks:
                index = self.recipe.task_names.index(name)
                moved = batch.of_task(index)
                examples = self._examples(self._pooled(hidden, moved, None), HeadBatch.of(moved))[index]
                found[name] = predictions_of(self.recipe.tasks[name], examples, self.heads[index])
        return found

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters for gradient surgery: encoder and shared LoRA, where trained."""
        shared = list(self.encoder.parameters())
        if self.lora is not None and self.recipe.lora.shared:
            shared += self.lora.parameters()
        return [parameter for parameter in shared if parameter.requires_grad]

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Return the shared parameters whose gradients are stored as rows: the word embeddings.

        Only the rows of words in the batch are not zero. [] if the encoder is frozen.
        """
        return [table for table in self.encoder.tables if table.requires_grad]

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that are not shared: {"adapters": [...], "heads": [...]}.

        A LoRA of each task is among the adapters.
        """
        adapters = [] if self.adapter is None else list(self.adapter.parameters())
        if self.lora is not None and not self.recipe.lora.shared:
            adapters += self.lora.parameters()
        return {"adapters": adapters, "heads": list(self.heads.parameters())}

    def parameter_groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Return the optimiser's groups: `encoder`, `adapters`, `lora`, `heads` (see groups.py)."""
        parts = [("encoder", self.encoder, config.lr), ("heads", self.heads, config.head_lr)]
        if self.adapter is not None:
            parts.insert(1, ("adapters", self.adapter, config.adapter_lr))
        if self.lora is not None:
            parts.insert(-1, ("lora", self.lora, config.adapter_lr))
        rated = [(name, module, config.lr if lr is None else lr) for name, module, lr in parts]
        return parameter_groups(rated, config.weight_decay, config.layer_decay)

    def examples(
        self, batch: PackedBatch, task_grads: Sink | None = None, noise: Tensor | None = None
    ) -> list[Examples]:
        """Run encoder and heads; return an `Examples` for each task, in the order of the tasks.

        A task without examples has one with zero rows.
        task_grads: as in `forward`. noise [N, d]: added to the output of the embeddings.
        """
        return self._examples(self._vectors(batch, task_grads, noise), HeadBatch.of(batch))

    def losses_of(
        self, vectors: Vectors, batch: HeadBatch, terms: Callable[[list[Examples]], list[Tensor]] | None = None
    ) -> list[Tensor]:
        """Run heads and losses; return the T tasks' losses, each a 0-dim sum over the examples.

        vectors: the pooled sequences. batch: the batch's other inputs of heads and losses.
        terms: function that returns a term for each loss, added before the losses are weighted.
        """
        examples = self._examples(vectors, batch)
        losses = [self._loss(index, found, batch) for index, found in enumerate(examples)]
        if terms is not None:
            losses = [loss + term for loss, term in zip(losses, terms(examples), strict=True)]
        learned = LEARNED.get(self.recipe.weighting.name)
        if learned is not None:
            parts = zip(self.heads, losses, batch.loss_terms, strict=True)
            losses = [head.get_submodule(learned)(loss, count) for head, loss, count in parts]
        return losses

    def _vectors(self, batch: PackedBatch, task_grads: Sink | None, noise: Tensor | None = None) -> Vectors:
        hidden = self.encoder(batch, self.adapter, task_grads, noise, self.lora)
        return self._pooled(hidden, batch, task_grads)

    def _pooled(self, hidden: Tensor, batch: PackedBatch, task_grads: Sink | None) -> Vectors:
        """Return the vectors that the heads read, given the hidden states [N, d]."""
        found: Vectors = {name: pooling(name)(hidden, batch) for name in self._poolings()}
        if "pooler" in found:
            assert isinstance(self.encoder.pooler, Pooler)
            found["pooler"] = self.encoder.pooler(found["pooler"], batch, task_grads)
        for index, (task, head) in enumerate(zip(self.recipe.tasks.values(), self.heads, strict=True)):
            embed = head.get_submodule("embed")
            if task.scores == "tokens":
                units = batch.units_of(index)
                found[index] = hidden[:0] if units is None or units.rows is None else hidden[units.rows]
            if isinstance(embed, Recurrent):
                start, stop = batch.host.seq_offsets[index : index + 2]
                lengths = np.diff(batch.host.cu_seqlens[start : stop + 1]).tolist()
                found[index] = embed(hidden[slice(*batch.host.token_offsets[index : index + 2])], lengths)
        return found

    def _examples(self, vectors: Vectors, batch: HeadBatch) -> list[Examples]:
        found = []
        for index, (name, head) in enumerate(zip(self.recipe.task_names, self.heads, strict=True)):
            task, first, stop = self.recipe.tasks[name], *batch.seq_offsets[index : index + 2]
            own, embed = vectors.get(index), head.get_submodule("embed")
            u = vectors[task.pooling][first:stop] if own is None else own
            u = u if isinstance(embed, Recurrent) else embed(u)
            units = None if task.scores == "rows" else _units(batch, index, u)
            v = None
            if task.pairs == "bi":
                pairs = batch.pairs[index]
                if pairs is None and len(u):
                    raise UserError(f"tasks.{name}.pairs: bi, but its examples are single texts")
                u, v = (u, u) if pairs is None else (u[pairs[:, 0] - first], u[pairs[:, 1] - first])
            found.append(Examples(precise(head(u, v)), u, v, units))
        return found

    def _loss(self, index: int, found: Examples, batch: HeadBatch) -> Tensor:
        """Return the loss of the task `index`, summed over its examples, before weighting."""
        name, task = list(self.recipe.tasks.items())[index]
        loss, labels, count = self.losses[index], batch.labels[index], batch.counts[index]
        if labels is None:
            if count:
                raise ValueError(f"task '{name}': the batch has no labels for its examples")
            labels = found.outputs.new_zeros(0)
        if found.units is not None:
            return loss.of_units(found, labels if count else labels.long(), self.heads[index])
        total = loss(found.outputs, targets(task, labels)).sum() if count else found.outputs.sum()
        if loss.pairs:
            assert found.v is not None
            if task.mnr.cached and batch.cached is None:
                raise ValueError(f"task '{name}': mnr.cached: give the step's micro-batches to cache_pairs first")
            cached = None if batch.cached is None else batch.cached.tasks.get(index)
            terms = loss.of_pairs(found.u, found.v, labels) if cached is None else cached.of_pairs(found.u, found.v)
            total = total + terms.sum()
        return total

    def _poolings(self) -> list[str]:
        """Return the names of the poolings that the heads read, each once."""
        tasks = zip(self.recipe.tasks.values(), self.heads, strict=True)
        pooled = [
            task.pooling for task, head in tasks if not isinstance(head.embed, Recurrent) and task.scores != "tokens"
        ]
        return list(dict.fromkeys(pooled))


def _units(batch: HeadBatch, index: int, u: Tensor) -> Units:
    """Return the units of a task in the batch; those of no example if the task is absent."""
    units = batch.units[index] if batch.units else None
    if units is not None:
        return units
    none = u.new_zeros(0, dtype=torch.int64)
    return Units(none, u.new_zeros(1, dtype=torch.int64), none, (0,))


def predictions_of(task: TaskConfig, found: Examples, head: nn.Module) -> Tensor:
    """Return the predictions of a task, as `MultiTaskModel.predict` does. head: the task's."""
    if task.type in UNIT_TYPES:
        return UNIT_TYPES[task.type].predictions(task, found, head)
    return predictions(task, found.outputs)


def _check_trained(task: TaskConfig, head: nn.Module, loss: TaskLoss) -> None:
    """Raise UserError if no loss of the task would train the head's own weights.

    A loss of u and v, such as mnr, does not read the head's outputs.
    """
    own = [name for name, _ in head.named_parameters() if not name.startswith("embed.")]
    if own and not loss.reads_outputs:
        default = TYPES[task.type].loss
        raise UserError(
            f"loss: {task.loss_name} reads u and v only, so the weights of the {task.head.name} head would stay "
            f"random: use head.name: cosine, or add a loss of the outputs, as in [{default}, {next(iter(task.losses))}]"
        )
