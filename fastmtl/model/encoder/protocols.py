"""Protocols of the objects that an encoder's forward calls: an adapter, its top, a recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.context import ForwardContext

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


class TopModule(Protocol):
    """Layers after the encoder's last one. num_layers: layers whose dropout places they use."""

    num_layers: int

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden states [N, d] to [N, d]."""


class LayerAdapter(Protocol):
    """Task-specific function beside the encoder's layers."""

    training: bool

    @property
    def top(self) -> TopModule | None: ...

    def __call__(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor | None:
        """Return the summand [N, d] of the layer's feed-forward output, None for no summand.

        hidden: the input of the layer [N, d].
        """


class RecordedEncoder(Protocol):
    """A recording of the encoder's forward and backward in training."""

    def embeds(self, sink: Sink | None) -> bool:
        """Return whether the recording includes the embeddings, for a forward with this sink."""

    def run(
        self, hidden: Tensor | None, batch: PackedBatch, context: ForwardContext, extra: Sequence[str] = ()
    ) -> Tensor | None:
        """Return the last hidden states [N, d], or None where the encoder has to run its layers.

        hidden: the embeddings' output [N, d]; None where the recording includes the embeddings.
        context: without an attention plan. extra: names of features of this forward that no
        recording supports; with one, the recording warns and returns None.
        """
