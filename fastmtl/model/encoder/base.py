"""The base class of all encoders: what the rest of fastmtl uses of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from fastmtl.config import Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.context import LinearAdapter
from fastmtl.model.encoder.pooler import Pooler, UnusedPooler
from fastmtl.model.encoder.protocols import LayerAdapter, RecordedEncoder
from fastmtl.model.encoder.settings import EncoderSettings

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


class Encoder(nn.Module):
    """Map a packed batch of N tokens to hidden states [N, d].

    There are two: PackedEncoder, whose layers are fastmtl's, and TransformersEncoder.

    config: transformers' configuration, kept to be saved with the encoder. settings: what all other
    code reads. max_length: largest number of tokens per sequence. pooler: None without one.
    recorded: replays recordings in training, as CUDA graphs do; None by default.
    trunk: the module to which surgery attaches; None if the layers write into the sink themselves.
    note: one line for the user about how the encoder runs; "" for a packed one.
    """

    config: PretrainedConfig
    settings: EncoderSettings
    max_length: int
    pooler: Pooler | UnusedPooler | None
    recorded: RecordedEncoder | None
    trunk: nn.Module | None = None
    note = ""

    @property
    def words(self) -> nn.Parameter:
        """The word table [V, e]; its gradient has the rows of the batch's words only."""
        raise NotImplementedError

    @property
    def tables(self) -> list[nn.Parameter]:
        """The tables whose gradients are stored as rows: by default that of the words."""
        return [self.words]

    def beside_weights(self) -> dict[str, Any]:
        """Return the settings that change the results of the same weights, by name."""
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
        return {name: getattr(self.settings, name) for name in names}

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise UserError, naming the key, for a setting that the encoder does not support."""

    def layers_above(self) -> dict[int, int]:
        """Return {id of a parameter: number of layers above the one that it belongs to}.

        It is 0 for the last layer and for what follows it, and the number of layers for the
        embeddings. A parameter of several layers belongs to the last of them.
        """
        raise NotImplementedError

    def use_pooler(self) -> None:
        """Train the encoder's pooler. Raises UserError if it has none."""
        raise NotImplementedError

    def forward(
        self,
        batch: PackedBatch,
        adapter: LayerAdapter | None = None,
        task_grads: Sink | None = None,
        noise: Tensor | None = None,
        lora: LinearAdapter | None = None,
    ) -> Tensor:
        """Return the hidden states [N, d]; the arguments are those of PackedEncoder.forward."""
        raise NotImplementedError
