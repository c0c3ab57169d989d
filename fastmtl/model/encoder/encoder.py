"""The base class of encoders on packed sequences: one forward, whatever the layers compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.context import ForwardContext, LinearAdapter
from fastmtl.model.encoder.layers import AddLayerNorm, Norm, TaskLayerNorm
from fastmtl.model.encoder.pooler import Pooler, UnusedPooler
from fastmtl.model.encoder.protocols import LayerAdapter, RecordedEncoder
from fastmtl.model.encoder.recompute import RecomputedResults
from fastmtl.model.encoder.settings import EncoderSettings

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


class PackedEncoder(Encoder):
    """Encoder for packed sequences of N tokens in all, without padding. Hidden size d.

    A subclass is a family of encoders. It defines `settings_of`, `layers` and `words`, and creates
    the module `embeddings`, called with token ids, token types, positions and the context. A layer
    is called with the hidden states [N, d], the adapter's term [N, d] or None, and the context.

    config: transformers' configuration, kept to be saved with the encoder. Everything else reads
        the attribute `settings`.
    recompute: the results that backward computes again instead of keeping them, to save memory.
        "none": no results; "cheap": those of LayerNorm and of the activation; "full": those of
        every layer. Gradients have the same bits in all three cases.
    max_length: largest number of tokens per sequence, at most settings.max_tokens, the default.
    Attribute pre_norm: True if layers have a LayerNorm before each part, and one follows the last.
    Attribute gated: True if the feed-forward part multiplies the halves of its first map's output.
    Attribute rotations: numbers in tables of rotations, which are kept between forwards.
    Attribute recorded: replays recordings in training, as CUDA graphs do; None by default.
    Attribute not_recorded: the reason why no recording can be made of this family; "" if one can.
    Attributes distances, terms: rows of the table of relative positions that each layer projects,
    and the number of projections; 0 without such a table.
    Attribute left_out: names of tensors that files may have and this configuration does not use.
    Attribute linears: {name in lora.targets: name of the module in a layer}; by default BERT's.
    """

    not_recorded = ""
    left_out: frozenset[str] = frozenset()
    linears: ClassVar[Mapping[str, str]] = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    }
    pre_norm: bool = False
    gated: bool = False
    rotations: int = 0
    distances: int = 0
    terms: int = 0
    embeddings: nn.Module

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.settings = self.settings_of(config)
        self.recompute = recompute
        self.max_length = max_length or self.settings.max_tokens
        self.recorded: RecordedEncoder | None = None
        self.pooler: Pooler | UnusedPooler | None = None

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        """Return the settings of a configuration of this family."""
        raise NotImplementedError

    @property
    def layers(self) -> nn.ModuleList:
        """The layers in their order. A module that occurs several times shares its weights."""
        raise NotImplementedError

    @property
    def words(self) -> nn.Parameter:
        """The word table [V, e]; its gradient has the rows of the batch's words only."""
        raise NotImplementedError

    def layers_above(self) -> dict[int, int]:
        layers = list(self.layers)
        found = {id(parameter): 0 for parameter in self.parameters()}
        found |= {id(parameter): len(layers) for parameter in self.embeddings.parameters()}
        for number, layer in enumerate(layers, start=1):
            found |= {id(parameter): len(layers) - number for parameter in layer.parameters()}
        return found

    def begin(self, context: ForwardContext) -> ForwardContext:
        """Return the context with `common`, data that all layers read; by default without.

        Examples are tables of rotations or of biases by relative position.
        """
        return context

    def finish(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map the last layer's output to the encoder's, both [N, d]; by default itself."""
        return hidden

    def use_layer_norm(self, norm: Norm) -> None:
        """Use `norm`, another library's function, for every LayerNorm.

        The dropout and the sum before a LayerNorm are still computed by fastmtl.
        """
        for module in self.modules():
            if isinstance(module, (AddLayerNorm, TaskLayerNorm)):
                module.norm_override = norm

    def reserve_pooler(self) -> None:
        """Add a place for pooler weights, which are loaded and saved but not used.

        Call `use_pooler` to use and train them.
        """
        self.pooler = UnusedPooler(self.settings.hidden_size)

    def use_pooler(self) -> None:
        """Replace the unused pooler weights by a `Pooler` with these weights, which is trained.

        Raises UserError if the encoder's directory had no pooler weights.
        """
        if self.pooler is None:
            raise UserError(
                "pooling: pooler needs the encoder's pooler.dense, and its directory has none: use cls, mean or max"
            )
        if isinstance(self.pooler, UnusedPooler):
            weights = self.pooler.state_dict()
            with torch.device("meta"):
                self.pooler = Pooler(self.settings.hidden_size)
            self.pooler.load_state_dict(weights, assign=True)

    def forward(
        self,
        batch: PackedBatch,
        adapter: LayerAdapter | None = None,
        task_grads: Sink | None = None,
        noise: Tensor | None = None,
        lora: LinearAdapter | None = None,
    ) -> Tensor:
        """Return the hidden states [N, d] after the last layer, or after the adapter's top.

        adapter(hidden, context): returns the term [N, d] that is added to the feed-forward
        output of this layer, or None for no term.
        task_grads: sink for the gradients per task; used while it is armed.
        noise [N, d]: added to the output of the embeddings.
        lora: adds terms to the outputs of linear layers.
        """
        top = None if adapter is None else adapter.top
        num_layers = len(self.layers) + (0 if top is None else top.num_layers)
        training = self.training or any(part is not None and part.training for part in (adapter, lora))
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        recomputed = RecomputedResults() if recompute == "cheap" else None
        recorded = self.recorded if self.training and torch.is_grad_enabled() else None
        context = ForwardContext.build(
            batch,
            num_layers,
            training=training,
            task_grads=task_grads,
            recomputed=recomputed,
            plan=recorded is None,
            lora=lora,
        )
        # With the sink, backward would run through all layers below the first one that is trained.
        frozen = not any(parameter.requires_grad for parameter in self.embeddings.parameters())

        def embedded() -> Tensor:
            of_embeddings = replace(context, task_grads=None) if frozen else context
            hidden = self.embeddings(batch.input_ids, batch.token_type_ids, batch.position_ids, of_embeddings)
            return hidden if noise is None else hidden + noise.to(hidden.dtype)

        if recorded is None:
            hidden = embedded()
        else:
            unsupported = {
                "an adapter": adapter,
                "a LoRA": lora,
                "noise": noise,
                "recompute": recompute != "none" or None,
            }
            extra = [name for name, value in unsupported.items() if value is not None]
            before = None if recorded.embeds(context.armed) and not extra else embedded()
            found = recorded.run(before, batch, context, extra)
            if found is not None:
                return found
            hidden = embedded() if before is None else before
            context = context.planned()
        run = partial(checkpoint, use_reentrant=False) if recompute == "full" else _call
        with nullcontext() if recomputed is None else recomputed.saving():
            hidden = self.run_layers(hidden, context, adapter, run)
            return hidden if top is None else run(top, hidden, context)

    def run_layers(
        self,
        hidden: Tensor,
        context: ForwardContext,
        adapter: LayerAdapter | None = None,
        run: Callable[..., Tensor] = _call,
    ) -> Tensor:
        """Map the output of the embeddings [N, d] to the encoder's hidden states [N, d].

        run(function, *arguments): calls the function of one layer; a checkpoint, for instance.
        """
        context = self.begin(context)
        for index, layer in enumerate(self.layers):
            hidden = run(_run, layer, adapter, hidden, context.at(index))
        return self.finish(hidden, context)


def _run(layer: nn.Module, adapter: LayerAdapter | None, hidden: Tensor, context: ForwardContext) -> Tensor:
    task_specific = None if adapter is None else adapter(hidden, context)
    return layer(hidden, task_specific, context)
