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
    """Layers after the encoder's last one.

    num_layers: number of layers for which it uses dropout seeds (see context.py).
    """

    num_layers: int

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden states [N, d] to [N, d]."""


class LayerAdapter(Protocol):
    """Task-specific function whose output is added inside the encoder's layers. top: or None."""

    training: bool

    @property
    def top(self) -> TopModule | None: ...

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor | None:
        """Return the term [N, d] to add to the layer's feed-forward output, or None for no term.

        hidden: the input [N, d] of the layer `context.layer`.
        """


class RecordedEncoder(Protocol):
    """A recording of the encoder's forward and backward in training."""

    def embeds(self, sink: Sink | None) -> bool:
        """Return True if the recording of a forward with this sink includes the embeddings."""

    def run(
        self, hidden: Tensor | None, batch: PackedBatch, context: ForwardContext, extra: Sequence[str] = ()
    ) -> Tensor | None:
        """Return the last hidden states [N, d] from a recording, or None if there is none.

        After None the encoder has to run its layers itself.
        hidden: the output of the embeddings [N, d]; None if the recording includes the embeddings.
        context: without an attention plan.
        extra: names of features of this forward, such as "noise", that no recording supports. If
        there are any, the recording warns and returns None.
        """
