"""The memory of an adapter on top of the encoder: a layer for each task, or PAL."""

from __future__ import annotations

from dataclasses import replace

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight
from fastmtl.profile.post_norm import PostNorm
from fastmtl.profile.rows import Rows
from fastmtl.profile.shape import Shape


class LayersOnTop:
    """A layer like BERT's for each task, which run one after another on the rows of their task.

    All tasks are taken to have equally many rows.
    """

    def __init__(self, shape: Shape) -> None:
        tokens, tasks = shape.load.tokens, shape.tasks
        self._whole = Rows(shape, keeps_inputs=True)
        self._layers = []
        for task in range(tasks):
            load = replace(shape.load, tokens=tokens * (task + 1) // tasks - tokens * task // tasks)
            plain = replace(shape, gated=False, distances=0, terms=0, load=load)
            self._layers.append(PostNorm(Rows(plain, keeps_inputs=True)))

    @staticmethod
    def numbers(shape: Shape) -> int:
        """Return the number of weights in the maps of all tasks."""
        return shape.tasks * shape.hidden * (4 * shape.hidden + 2 * shape.intermediate)

    def forward(self, ledger: Ledger) -> None:
        for layer in self._layers:
            layer.forward(ledger, adapts=False)
        ledger.touch(self._whole.d)  # the tasks' rows are concatenated
        if self._whole.shape.recompute == "full":
            ledger.drop("activations", sum(layer.inside for layer in self._layers))

    def backward(self, ledger: Ledger, weight: Weight, *, recomputed_input: bool) -> None:
        """Replace dy by the gradient of the encoder's output, which all tasks' layers read.

        The layers read parts of one input and one dy, held until the last layer is done. weight:
        called for each gradient of a layer's weight.
        """
        whole = self._whole.d
        if self._whole.shape.recompute == "full":
            for layer in self._layers:
                layer.recompute(ledger, adapts=False)
        for layer in self._layers:
            part = layer.rows.d
            ledger.hold("workspace", part)
            with ledger.holding(whole - part if recomputed_input else 0):
                layer.backward(ledger, weight, adapts=False, recomputed_input=recomputed_input)
            ledger.hold("activations", 0 if recomputed_input else part)
        ledger.drop("workspace", whole)
        ledger.drop("activations", 0 if recomputed_input else whole)
        ledger.touch(whole)


def pal_on_top_forward(ledger: Ledger, rows: Rows) -> None:
    """Run h + V_D MHA(V_E h): hold its output beside the layers' output."""
    ledger.hold("activations", rows.pal)
    with ledger.holding(rows.d):
        ledger.hold("activations", rows.d)


def pal_on_top_backward(ledger: Ledger, rows: Rows, *, recomputed_input: bool) -> None:
    """Add the projections' gradients to dy, held as workspace."""
    ledger.touch(5 * rows.s)
    ledger.touch(rows.s + (3 if recomputed_input else 2) * rows.d)
    ledger.drop("activations", rows.pal + (0 if recomputed_input else rows.d))
