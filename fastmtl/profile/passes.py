"""Forward and backward of one micro-batch, simulated on a ledger layer by layer."""

from __future__ import annotations

from dataclasses import replace

from fastmtl.profile import layers
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight, ignore_weight
from fastmtl.profile.rows import Rows
from fastmtl.profile.shape import Shape


class Pass:
    """The simulation of forward and backward of micro-batch `number` on a ledger."""

    def __init__(self, ledger: Ledger, shape: Shape, number: int) -> None:
        shape = replace(shape, load=shape.loads[number])
        adapter = shape.adapter
        self._ledger, self._shape = ledger, shape
        self._trained = shape.encoder_trained
        # DeepSpeed's linear layer of ZeRO 3 keeps its input even if its weight is frozen.
        keeps_inputs = self._trained or shape.zero == 3
        size = 0 if adapter is None else adapter.size
        self._rows = Rows(shape, keeps_inputs=keeps_inputs, adapter_size=size, shared=self._trained)
        self._rows_with_lora = Rows(
            shape, keeps_inputs=keeps_inputs, adapter_size=size, shared=self._trained, lora=shape.lora
        )
        self._top = "none" if adapter is None else adapter.top
        self._on_top = Rows(shape, keeps_inputs=True, adapter_size=0 if adapter is None else adapter.top_size)
        carrying = 0 if adapter is None else adapter.layers
        # The first layer in autograd's graph; nothing below it is trained.
        first = shape.layers - carrying if shape.lora is None else min(shape.lora.first, shape.layers - carrying)
        self._first = 0 if self._trained else first

    def _starts_graph(self, layer: int) -> bool:
        """Return whether autograd's graph starts at the layer, only because it has an adapter."""
        return not self._trained and layer == self._first and not self._has_lora(layer)

    def _has_lora(self, layer: int) -> bool:
        """Return whether a layer has a LoRA; the layers with one are taken as adjacent."""
        lora = self._shape.lora
        return lora is not None and lora.first <= layer < lora.first + lora.layers

    def _rows_of(self, layer: int) -> Rows:
        return self._rows_with_lora if self._has_lora(layer) else self._rows

    def _recomputes_input(self, layer: int) -> bool:
        """Return whether backward recomputes the input of a layer, which is a LayerNorm's output.

        The number shape.layers stands for the adapter on top.
        """
        return self._rows.recomputes and layer > self._first

    def forward(self) -> None:
        ledger, rows, shape = self._ledger, self._rows, self._shape
        ledger.phase = "forward"
        layers.embeddings_forward(ledger, rows, trained=self._trained)
        for layer in range(shape.layers):
            rows = self._rows_of(layer)
            if layer < self._first:
                layers.layer_without_graph(ledger, rows)
                continue
            adapts, before = layers.has_adapter(shape, layer), ledger.held["activations"]
            if self._starts_graph(layer):
                layers.first_adapter_forward(ledger, rows)
            else:
                layers.layer_forward(ledger, rows, adapts=adapts)
            if shape.recompute == "full":
                ledger.drop("activations", ledger.held["activations"] - before - rows.d)
            ledger.drop("activations", rows.d if self._recomputes_input(layer) else 0)
        if self._top == "layer":
            layers.layer_forward(ledger, self._on_top, adapts=False)
            ledger.touch(rows.d)  # the tasks' rows are concatenated
            if shape.recompute == "full":
                ledger.drop("activations", self._on_top.layer)
        if self._top == "pal":
            layers.pal_on_top_forward(ledger, self._on_top)
        if self._top != "none" and self._recomputes_input(shape.layers):
            ledger.drop("activations", rows.d)
        layers.heads_forward(ledger, rows)

    def backward(self, weight: Weight, own: int | None = None) -> None:
        """Simulate the backward pass.

        weight: called for each gradient of a parameter. own: bytes of the gradients of the tasks'
        own parameters, which stay held; None if DeepSpeed handles them like other gradients.
        """
        ledger, rows, shape = self._ledger, self._rows, self._shape
        ledger.phase = "backward"
        below = self._trained or self._first < shape.layers or self._top != "none"
        at_once = own is None and (shape.joint or shape.scope != "tensor")
        layers.heads_backward(ledger, rows, below=below)
        ledger.hold("gradients", own or 0)
        if self._top == "layer":
            if shape.recompute == "full":
                layers.recompute_layer(ledger, self._on_top, adapts=False)
            layers.layer_backward(
                ledger,
                self._on_top,
                ignore_weight,
                adapts=False,
                recomputed_input=self._recomputes_input(shape.layers),
            )
        if self._top == "pal":
            layers.pal_on_top_backward(ledger, self._on_top, recomputed_input=self._recomputes_input(shape.layers))
        lora = shape.lora is not None and shape.lora.shared
        for layer in reversed(range(self._first, shape.layers)):
            rows = self._rows_of(layer)
            adapts = layers.has_adapter(shape, layer)
            if self._starts_graph(layer):
                if shape.recompute == "full":
                    layers.first_adapter_forward(ledger, rows)
                    ledger.drop("activations", rows.d)
                layers.first_adapter_backward(ledger, rows)
                continue
            if shape.recompute == "full":
                layers.recompute_layer(ledger, rows, adapts=adapts)
            shares = shape.layers - layer > shape.own_layers  # weights of a layer above, whose gradient is held
            adds = self._add_weight if shares else weight
            layers.layer_backward(
                ledger,
                rows,
                adds if self._trained else ignore_weight,
                adapts=adapts,
                recomputed_input=self._recomputes_input(layer),
                at_once=at_once,
                of_lora=adds if lora else ignore_weight,
            )
        if own is None:
            weight(ledger, shape.own, 0)
        if self._trained:
            layers.embeddings_backward(ledger, rows, weight, shape.table if own is None else 0, summed=own is None)
        elif below:
            ledger.drop("workspace", rows.d)

    def _add_weight(self, ledger: Ledger, numbers: int, rows: int) -> None:
        """Add to a gradient that is held already: a product, unless it is added to J directly."""
        shape = self._shape
        if shape.joint or shape.storage != "stacked" or shape.j_bytes != shape.number_bytes:
            ledger.touch(numbers * shape.number_bytes)
