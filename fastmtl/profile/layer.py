"""The memory of one kind of layer: what it keeps for backward, and its temporary tensors."""

from __future__ import annotations

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight, ignore_weight
from fastmtl.profile.lora_shape import LAYER_INPUT
from fastmtl.profile.rows import Rows


class LayerMemory:
    """The memory of one layer and, if the encoder has one, of a LayerNorm after the last layer.

    A subclass simulates the operations of its layer on a ledger, in the order of their allocations.
    A layer's input and output are activations, dy and the gradient of the input are workspace.

    rows: bytes of the layer's tensors. first: it is the encoder's lowest layer.
    Attribute ends_normed: a layer's output is that of a LayerNorm, which `cheap` computes again.
    """

    ends_normed: bool

    def __init__(self, rows: Rows, *, first: bool = False) -> None:
        self.rows, self.first = rows, first

    @property
    def inside(self) -> int:
        """Bytes that the layer keeps besides its input."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """Bytes that the layer keeps from forward to backward, including its input."""
        rows = self.rows
        if rows.shape.recompute == "full":
            return rows.d
        return self.inside + (rows.result(rows.d, LAYER_INPUT) if self.ends_normed else rows.d)

    def without_graph(self, ledger: Ledger) -> None:
        """Run a frozen layer with nothing trained below it: its output replaces its input."""
        raise NotImplementedError

    def first_adapter_forward(self, ledger: Ledger) -> None:
        """Run a frozen encoder's first layer with an adapter; only the adapter needs a graph."""
        raise NotImplementedError

    def first_adapter_backward(self, ledger: Ledger) -> None:
        raise NotImplementedError

    def forward(self, ledger: Ledger, *, adapts: bool) -> None:
        """Hold the layer's output, beside its input. adapts: the layer has an adapter."""
        raise NotImplementedError

    def recompute(self, ledger: Ledger, *, adapts: bool) -> None:
        """Run forward again in backward (`full`), up to the last tensor that is needed."""
        self.forward(ledger, adapts=adapts)
        ledger.drop("activations", self.rows.d)

    def backward(
        self,
        ledger: Ledger,
        weight: Weight,
        *,
        adapts: bool,
        recomputed_input: bool,
        at_once: bool = False,
        of_lora: Weight = ignore_weight,
    ) -> None:
        """Replace dy by the gradient of the layer's input; drop what the layer keeps.

        The input is dropped, the output is not. recomputed_input: the input is recomputed, not
        held. at_once: the gradients of the weights of q, k and v are one product. of_lora:
        called in place of `weight` for the matrices of a LoRA.
        """
        raise NotImplementedError

    def finish_forward(self, ledger: Ledger, *, graph: bool) -> None:
        """Run what follows the last layer. graph: backward will reach it."""

    def finish_backward(self, ledger: Ledger) -> None:
        """Replace dy of the encoder's output by that of the last layer's."""
