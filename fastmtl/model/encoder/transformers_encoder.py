"""Text encoders of transformers on padded batches (`encoder.implementation: transformers`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastmtl.config import Recipe, Recompute
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.context import LinearAdapter
from fastmtl.model.encoder.padding import Padding
from fastmtl.model.encoder.protocols import LayerAdapter
from fastmtl.model.encoder.transformers_settings import check_recipe, max_tokens, settings_of
from fastmtl.surgery.attach.sites import large_tables
from fastmtl.surgery.differentiate import leaves_of

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink

# Entries of a configuration that say how it was written.
_OF_FILES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
_PREFIX = "model."  # of names in the state dict, which weight files do not have
_TRIED = (7, 5)  # lengths of two texts on which a new encoder is tried
# Bound of a difference by rounding, relative to the largest hidden state.
_ROUNDING = 1e-4


class Rows(Protocol):
    """The method `rows` of GradientSurgery."""

    def __call__(self, tasks: Any) -> AbstractContextManager[None]: ...


class TransformersEncoder(Encoder):
    """A model of transformers that takes and returns packed sequences, N tokens in all.

    The model gets rows that are padded to the batch's longest sequence, and computes their position
    ids itself. Its modules write no task gradients: surgery attaches to `trunk`. The attribute
    `rows` is then surgery's method of this name, inside which the model has to run; else None.

    model: a class of transformers with a `last_hidden_state` [B, L, d]. config: its configuration.
    Parameters that the hidden states do not depend on, as those of a pooler, are frozen: an
    optimizer would only decay them.
    recompute: "none", or "full": each layer is computed again in backward.
    max_length: largest number of tokens per sequence; default: the rows of the position table.
    Raises UserError for a model that does not run on padded texts, and if max_length is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PretrainedConfig,
        *,
        recompute: Recompute = "none",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.config = config
        self.pooler = self.recorded = None
        self.rows: Rows | None = None
        self._takes = {"attention_mask", "token_type_ids"} & inspect.signature(model.forward).parameters.keys()
        self._padding_id = getattr(config, "pad_token_id", None) or 0
        self.max_length = max_tokens(model, config, max_length)
        self.settings = settings_of(config, self.words, self.max_length)
        self._try()
        self._recompute(recompute)

    @property
    def trunk(self) -> nn.Module:  # type: ignore[override]
        return self.model

    @property
    def words(self) -> nn.Parameter:
        return self.model.get_input_embeddings().weight

    @property
    def tables(self) -> list[nn.Parameter]:
        return large_tables(self.model, list(self.parameters()))

    def beside_weights(self) -> dict[str, Any]:
        entries = self.config.to_dict().items()
        return {name: value for name, value in entries if name not in _OF_FILES and "drop" not in name}

    def check_recipe(self, recipe: Recipe) -> None:
        check_recipe(type(self.model).__name__, recipe)

    def use_pooler(self) -> None:
        raise UserError(
            "pooling: pooler needs encoder.implementation: packed; with transformers' own modules use cls, mean or max"
        )

    def file_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the encoder's state dict under their names in weight files.

        A tied tensor is returned once, under the first of its names.
        """
        first: dict[int, str] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            first.setdefault(id(tensor), name)
        return {name.removeprefix(_PREFIX): tensors[name] for name in first.values()}

    def forward(
        self,
        batch: PackedBatch,
        adapter: LayerAdapter | None = None,
        task_grads: Sink | None = None,
        noise: Tensor | None = None,
        lora: LinearAdapter | None = None,
    ) -> Tensor:
        """Return the hidden states [N, d] after the last layer.

        task_grads: not used, since surgery attaches to the model. adapter, noise, lora: always
        None.
        """
        assert adapter is None and noise is None and lora is None, "check_recipe refuses adapters, SMART and LoRA"
        padding = Padding.of(batch)
        bounds = batch.host.seq_offsets
        tasks = [task for task, stop in enumerate(bounds[1:]) for _ in range(bounds[task], stop)]
        with nullcontext() if self.rows is None else self.rows(tasks):
            hidden = self._run(padding, batch.input_ids, batch.token_type_ids)
        return padding.unpad(hidden)

    def run_tried(self) -> Tensor:
        """Return the padded hidden states of two short texts. The encoder is on the CPU."""
        longer, shorter = _TRIED
        places = [*range(longer), *range(longer, longer + shorter)]
        return self._run(Padding(2, longer, torch.tensor(places)), *self._tokens())

    def _run(self, padding: Padding, ids: Tensor, types: Tensor) -> Tensor:
        """Return the padded hidden states [B, L, d]. ids, types: int64 [N]."""
        inputs = {"input_ids": padding.pad(ids, self._padding_id), "return_dict": True}
        if "attention_mask" in self._takes:
            inputs["attention_mask"] = padding.mask()
        if "token_type_ids" in self._takes and self.settings.type_vocab_size:
            inputs["token_type_ids"] = padding.pad(types, 0)
        return self.model(**inputs).last_hidden_state

    def _recompute(self, recompute: Recompute) -> None:
        name, supported = type(self.model).__name__, self.model.supports_gradient_checkpointing
        if recompute == "cheap":
            raise UserError(
                f"encoder.recompute: cheap needs encoder.implementation: packed; {name} of transformers supports "
                + ("none and full" if supported else "none")
            )
        if recompute == "full" and not supported:
            raise UserError(f"encoder.recompute: full: {name} of transformers cannot recompute its layers: use none")
        if recompute == "full":
            enable = getattr(self.model, "activation_checkpointing_enable", None)  # the name since transformers 5.20
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def _try(self) -> None:
        """Run two short texts; freeze the parameters without an effect, and write the note."""
        name, training, (longer, shorter) = type(self.model).__name__, self.training, _TRIED
        self.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                hidden = self.run_tried()
                with torch.no_grad():
                    alone = self._run(Padding(1, shorter, torch.arange(shorter)), *self._tokens(longer))
        except Exception as error:  # whatever a model raises
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"encoder.path: {name} of transformers does not run on texts of {longer} and {shorter} tokens: take "
                f"another encoder ({first})"
            ) from error
        finally:
            self.train(training)
        if hidden.shape != (2, longer, self.settings.hidden_size):
            raise UserError(
                f"encoder.path: {name} of transformers returns hidden states of shape {tuple(hidden.shape)} for two "
                f"texts of {longer} tokens and hidden_size {self.settings.hidden_size}: take another encoder"
            )
        reached = leaves_of(hidden)
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in reached)
        self.note = f"encoder: {name} of transformers on padded batches"
        if (hidden[1, :shorter].detach() - alone[0]).abs().max() > _ROUNDING * alone.abs().max():
            self.note += "; as always with this model, padding changes a text's hidden states"

    def _tokens(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and types of the tokens of both texts, from the token `start` on."""
        number = sum(_TRIED)
        ids = [token for token in range(len(self.words)) if token != self._padding_id][:number] * number
        return torch.tensor(ids[start:number]), torch.zeros(number - start, dtype=torch.int64)
