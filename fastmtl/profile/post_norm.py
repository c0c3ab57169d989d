"""The memory of a layer with a LayerNorm after each part, as in BERT."""

from __future__ import annotations

from fastmtl.profile.layer import LayerMemory
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight, ignore_weight
from fastmtl.profile.lora_shape import LAYER_INPUT
from fastmtl.profile.rows import adapter_backward, drop_input, drop_output_gradient, norm_backward


class PostNorm(LayerMemory):
    """A layer that ends with a LayerNorm, whose output `cheap` computes again."""

    ends_normed = True

    @property
    def inside(self) -> int:
        """Bytes of q, k, v, attention's output, norms, a norm's output, activation in and out."""
        rows = self.rows
        attention = 3 * rows.d + rows.relative + rows.attention_stats + rows.input(rows.d, "attended")
        ends = rows.result(rows.d, "normed") + rows.f + rows.result(rows.f, "activated")
        return attention + rows.norm(0) + rows.norm(1) + ends + rows.lora.kept

    def without_graph(self, ledger: Ledger) -> None:
        rows = self.rows
        attention = max(3 * rows.d + rows.projections, 4 * rows.d + rows.attention_stats)
        ledger.touch(max(attention, rows.d + 2 * rows.f, 4 * rows.d + rows.f + rows.norm_stats))

    def first_adapter_forward(self, ledger: Ledger) -> None:
        rows = self.rows
        ledger.hold("activations", rows.adapter)
        with ledger.holding(rows.d):
            self.without_graph(ledger)
            with ledger.holding(2 * rows.d):
                ledger.hold("activations", rows.norm(1) + rows.d)

    def first_adapter_backward(self, ledger: Ledger) -> None:
        rows = self.rows
        norm_backward(ledger, rows, 1)
        ledger.drop("workspace", rows.d if rows.masks[1] else 0)
        adapter_backward(ledger, rows)
        ledger.drop("activations", rows.adapter + rows.d)

    def forward(self, ledger: Ledger, *, adapts: bool) -> None:
        rows = self.rows
        if adapts:
            ledger.hold("activations", rows.adapter)
        with ledger.holding(rows.d if adapts else 0):
            attended, normed = rows.input(rows.d, "attended"), rows.result(rows.d, "normed")
            activated = rows.result(rows.f, "activated")
            rows.lora.forward(ledger, LAYER_INPUT)
            with ledger.holding(rows.projections + rows.lora.outputs(LAYER_INPUT)):
                ledger.hold("activations", 3 * rows.d + rows.relative)
            with ledger.holding(rows.d - attended):
                ledger.hold("activations", attended + rows.attention_stats)
                ledger.touch(rows.d)
                rows.lora.forward(ledger, "attended")
            with ledger.holding(rows.d):
                ledger.hold("activations", rows.norm(0) + normed)
            with ledger.holding(rows.d - normed):
                ledger.hold("activations", rows.f)
                rows.lora.forward(ledger, "normed")
                with ledger.holding(rows.f - activated):
                    ledger.hold("activations", activated)
                    rows.lora.forward(ledger, "activated")
                    with ledger.holding(rows.d):
                        ledger.hold("activations", rows.norm(1) + rows.d)

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
        hidden, intermediate = rows.shape.hidden, rows.shape.intermediate
        d, f = rows.d, rows.f
        # Without dropout, dx and dz are one tensor.
        split, split_first = (1 if rows.masks[1] else 0), (1 if rows.masks[0] else 0)
        # The second norm: dz goes to the residual and the adapter, dx to the dense layer.
        norm_backward(ledger, rows, 1)
        # output.dense
        with ledger.holding(rows.recomputed(f, "activated")):
            rows.lora.backward(ledger, "activated", of_lora)
            ledger.hold("workspace", f)
            weight(ledger, hidden * intermediate, d)
            drop_output_gradient(ledger, rows, split * d, "activated")
        drop_input(ledger, rows, f, rows.result(f, "activated"), "activated")
        # The activation.
        ledger.hold("workspace", f)
        ledger.drop("workspace", f)
        ledger.drop("activations", f)
        # intermediate.dense, whose input is also the residual.
        with ledger.holding(rows.recomputed(d, "normed")):
            rows.lora.backward(ledger, "normed", of_lora)
            ledger.hold("workspace", d)
            weight(ledger, hidden * intermediate, f)
            drop_output_gradient(ledger, rows, f, "normed")
        drop_input(ledger, rows, d, rows.result(d, "normed"), "normed")
        keeps_dz = rows.outlive and not split
        if adapts or keeps_dz:
            ledger.touch(d)  # dz is read later, so it is not added to in place
        if not adapts:
            ledger.drop("workspace", d)
        ledger.hold("task gradients", d if keeps_dz else 0)
        # The first norm.
        norm_backward(ledger, rows, 0)
        keeps_dz = rows.outlive and not split_first
        # attention.output.dense
        rows.lora.backward(ledger, "attended", of_lora)
        ledger.hold("workspace", d)
        weight(ledger, hidden * hidden, d)
        drop_output_gradient(ledger, rows, split_first * d, "attended")
        drop_input(ledger, rows, d, rows.input(d, "attended"), "attended")
        # Attention: all of q, k, v at once.
        ledger.hold("workspace", 3 * d)
        ledger.drop("workspace", d)
        ledger.drop("activations", 3 * d + rows.relative + rows.attention_stats)
        ledger.hold("workspace", d if recomputed_input else 0)
        ledger.hold("workspace", d)
        ledger.touch(rows.projections)
        for _ in range(1 if at_once else 3):
            weight(ledger, (3 if at_once else 1) * hidden * hidden, 3 * d if at_once else d)
        rows.lora.backward(ledger, LAYER_INPUT, of_lora)
        drop_output_gradient(ledger, rows, 3 * d, LAYER_INPUT)
        if keeps_dz:
            ledger.touch(d)
        ledger.drop("workspace", d)
        ledger.hold("task gradients", d if keeps_dz else 0)
        if adapts:
            adapter_backward(ledger, rows)
            ledger.drop("activations", rows.adapter)
            ledger.drop("workspace", d)
        ledger.drop("workspace", d if recomputed_input else 0)
        drop_input(ledger, rows, d, 0 if recomputed_input else d, LAYER_INPUT)
