"""The memory of a layer with a LayerNorm before each part, as in ModernBERT.

    h' = h + dropout(Wo MHA(Wqkv LN(h)))      output: h' + Wo dropout(gelu(a) b)

a and b are the halves of Wi LN(h'). The first layer has no LayerNorm before attention. GeGLU keeps
its input [N, 2 f] only. A LayerNorm of h keeps h, which is the layer's input, and statistics.
"""

from __future__ import annotations

from fastmtl.profile.layer import LayerMemory
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight, ignore_weight
from fastmtl.profile.lora_shape import LAYER_INPUT
from fastmtl.profile.rows import Rows, adapter_backward, drop_input, drop_output_gradient


class PreNorm(LayerMemory):
    """A layer that ends with a sum, which is kept; a LayerNorm follows the last layer."""

    ends_normed = False

    def __init__(self, rows: Rows, *, first: bool = False) -> None:
        super().__init__(rows, first=first)
        # Input of the dropout between the maps of the feed-forward part.
        self._undropped = rows.f if rows.masks[1] else 0
        self._norm_before = 0 if first else rows.d

    @property
    def inside(self) -> int:
        """Bytes of q, k, v, attention's output, h', inputs of both maps, GeGLU's in and out."""
        rows = self.rows
        attention = self._statistics + rows.result(self._norm_before, LAYER_INPUT) + 3 * rows.d + rows.attention_stats
        between = rows.input(rows.d, "attended") + rows.norm(0) + rows.result(rows.d, "normed")
        return attention + between + rows.o + rows.result(rows.f, "activated") + rows.lora.kept

    @property
    def _statistics(self) -> int:
        return 0 if self.first else self.rows.norm_stats

    def without_graph(self, ledger: Ledger) -> None:
        rows = self.rows
        d, f, o = rows.d, rows.f, rows.o
        # x, q, k and v are held until attention's output has passed its map.
        attention = self._norm_before + 4 * d + max(rows.attention_stats, d)
        norm = 3 * d + rows.norm_stats
        ledger.touch(max(attention, norm, 2 * d + o + f + self._undropped, 3 * d + f, 4 * d))

    def first_adapter_forward(self, ledger: Ledger) -> None:
        rows = self.rows
        ledger.hold("activations", rows.adapter)
        with ledger.holding(rows.d):
            self.without_graph(ledger)
            with ledger.holding(rows.d):
                ledger.hold("activations", rows.d)

    def first_adapter_backward(self, ledger: Ledger) -> None:
        adapter_backward(ledger, self.rows)
        ledger.drop("activations", self.rows.adapter + self.rows.d)

    def forward(self, ledger: Ledger, *, adapts: bool) -> None:
        rows = self.rows
        with ledger.holding(rows.d if adapts else 0):
            self._keep(ledger, adapts=adapts)
            with ledger.holding(rows.d - rows.result(rows.d, "normed")):  # LN(h')
                with ledger.holding(rows.f - rows.result(rows.f, "activated")):
                    ledger.touch(rows.d)
                ledger.touch((3 if adapts else 2) * rows.d)
                ledger.hold("activations", rows.d)

    def recompute(self, ledger: Ledger, *, adapts: bool) -> None:
        with ledger.holding(self.rows.d if adapts else 0):
            self._keep(ledger, adapts=adapts)

    def _keep(self, ledger: Ledger, *, adapts: bool) -> None:
        """Hold all that the layer keeps, up to GeGLU's output."""
        rows = self.rows
        d, f = rows.d, rows.f
        if adapts:
            ledger.hold("activations", rows.adapter)
        ledger.hold("activations", self._statistics + rows.result(self._norm_before, LAYER_INPUT))
        with ledger.holding(self._norm_before - rows.result(self._norm_before, LAYER_INPUT)):
            rows.lora.forward(ledger, LAYER_INPUT)
            with ledger.holding(rows.lora.outputs(LAYER_INPUT)):
                ledger.hold("activations", 3 * d)
            with ledger.holding(d - rows.input(d, "attended")):
                ledger.hold("activations", rows.input(d, "attended") + rows.attention_stats)
                ledger.touch(d)
                rows.lora.forward(ledger, "attended")
        with ledger.holding(d):
            ledger.hold("activations", rows.norm(0) + rows.result(d, "normed"))
            ledger.touch(d - rows.result(d, "normed"))
        with ledger.holding(d - rows.result(d, "normed")):
            ledger.hold("activations", rows.o)
            rows.lora.forward(ledger, "normed")
            ledger.touch(f + self._undropped)
            ledger.hold("activations", rows.result(f, "activated"))
            with ledger.holding(f - rows.result(f, "activated")):
                rows.lora.forward(ledger, "activated")

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
        rows = self.rows
        hidden, intermediate, opened = rows.shape.hidden, rows.shape.intermediate, rows.shape.opened
        d, f, o = rows.d, rows.f, rows.o
        # Without dropout, the gradients of both terms of h' are one tensor.
        split = 1 if rows.masks[0] else 0
        # mlp.Wo: dy is also the gradient of h' and of the adapter's term.
        with ledger.holding(rows.recomputed(f, "activated")):
            ledger.touch(rows.recomputed(self._undropped, "activated"))
            rows.lora.backward(ledger, "activated", of_lora)
            ledger.hold("workspace", f)
            weight(ledger, hidden * intermediate, d)
        drop_input(ledger, rows, f, rows.result(f, "activated"), "activated")
        ledger.touch(self._undropped)
        # GeGLU.
        ledger.hold("workspace", o)
        ledger.drop("workspace", f)
        ledger.drop("activations", o)
        # mlp.Wi
        with ledger.holding(rows.recomputed(d, "normed")):
            rows.lora.backward(ledger, "normed", of_lora)
            ledger.hold("workspace", d)
            weight(ledger, hidden * opened, o)
            drop_output_gradient(ledger, rows, o, "normed")
        drop_input(ledger, rows, d, rows.result(d, "normed"), "normed")
        # The second norm: the gradients of h and of attention's part.
        ledger.hold("workspace", (1 + split) * d)
        ledger.drop("workspace", d)
        ledger.drop("activations", rows.norm(0))
        ledger.drop("workspace", 0 if adapts else d)
        ledger.hold("task gradients", d if rows.outlive else 0)
        # attn.Wo
        rows.lora.backward(ledger, "attended", of_lora)
        ledger.hold("workspace", d)
        weight(ledger, hidden * hidden, d)
        drop_output_gradient(ledger, rows, split * d, "attended")
        drop_input(ledger, rows, d, rows.input(d, "attended"), "attended")
        # Attention.
        ledger.hold("workspace", 3 * d)
        ledger.drop("workspace", d)
        ledger.drop("activations", 3 * d + rows.attention_stats)
        # attn.Wqkv
        before = self._norm_before
        with ledger.holding(rows.recomputed(before, LAYER_INPUT)):
            ledger.hold("workspace", d)
            weight(ledger, 3 * hidden * hidden, 3 * d)
            rows.lora.backward(ledger, LAYER_INPUT, of_lora)
            drop_output_gradient(ledger, rows, 3 * d, LAYER_INPUT)
        drop_input(ledger, rows, before, rows.result(before, LAYER_INPUT), LAYER_INPUT)
        # The first norm.
        ledger.hold("workspace", before)
        ledger.drop("workspace", before)
        ledger.drop("activations", self._statistics)
        # The sum of the input's gradients; without dropout the sink may hold one of them.
        kept_for_surgery = rows.outlive and not split
        ledger.touch(d if kept_for_surgery else 0)
        ledger.drop("workspace", d)
        ledger.hold("task gradients", d if kept_for_surgery else 0)
        if adapts:
            adapter_backward(ledger, rows)
            ledger.drop("activations", rows.adapter)
            ledger.drop("workspace", d)
        drop_input(ledger, rows, d if self.first else 0, d, LAYER_INPUT)

    def finish_forward(self, ledger: Ledger, *, graph: bool) -> None:
        rows = self.rows
        if graph:
            ledger.hold("activations", rows.norm_stats + rows.d)
        else:
            ledger.touch(rows.d)

    def finish_backward(self, ledger: Ledger) -> None:
        ledger.touch(self.rows.d)
        ledger.drop("activations", self.rows.norm_stats + self.rows.d)
