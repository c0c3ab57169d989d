"""Forward and backward of one micro-batch, simulated on a ledger layer by layer."""

from __future__ import annotations

from dataclasses import replace

from fastmtl.profile import layers
from fastmtl.profile.layer import LayerMemory
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight, ignore_weight
from fastmtl.profile.on_top import LayersOnTop, pal_on_top_backward, pal_on_top_forward
from fastmtl.profile.post_norm import PostNorm
from fastmtl.profile.pre_norm import PreNorm
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
        with_lora = Rows(shape, keeps_inputs=keeps_inputs, adapter_size=size, shared=self._trained, lora=shape.lora)
        kind = PreNorm if shape.pre_norm else PostNorm
        self._layers: list[LayerMemory] = [
            kind(with_lora if self._has_lora(number) else self._rows, first=number == 0)
            for number in range(shape.layers)
        ]
        self._top = "none" if adapter is None else adapter.top
        self._pal = Rows(shape, keeps_inputs=True, adapter_size=0 if adapter is None else adapter.top_size)
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

    def _recomputes_input(self, number: int) -> bool:
        """Return whether backward recomputes the input of a layer, since a LayerNorm made it.

        The number shape.layers stands for the adapter on top.
        """
        normed = number == self._shape.layers or self._layers[number].ends_normed
        return normed and self._rows.recomputes and number > self._first

    def forward(self) -> None:
        ledger, rows, shape = self._ledger, self._rows, self._shape
        ledger.phase = "forward"
        layers.embeddings_forward(ledger, rows, trained=self._trained)
        for number, layer in enumerate(self._layers):
            if number < self._first:
                layer.without_graph(ledger)
                continue
            before = ledger.held["activations"]
            if self._starts_graph(number):
                layer.first_adapter_forward(ledger)
            else:
                layer.forward(ledger, adapts=layers.has_adapter(shape, number))
            if shape.recompute == "full":
                ledger.drop("activations", ledger.held["activations"] - before - rows.d)
            ledger.drop("activations", rows.d if self._recomputes_input(number) else 0)
        self._layers[-1].finish_forward(ledger, graph=self._first < shape.layers)
        if self._top == "layer":
            LayersOnTop(shape).forward(ledger)
        if self._top == "pal":
            pal_on_top_forward(ledger, self._pal)
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
        on_top = LayersOnTop.numbers(shape) if self._top == "layer" else 0
        recomputes_input = self._recomputes_input(shape.layers)
        layers.heads_backward(ledger, rows, below=below)
        ledger.hold("gradients", own - on_top * shape.number_bytes if own else 0)
        if self._top == "layer":
            weigh = weight if own is None else self._hold_weight if own else ignore_weight
            LayersOnTop(shape).backward(ledger, weigh, recomputed_input=recomputes_input)
        if self._top == "pal":
            pal_on_top_backward(ledger, self._pal, recomputed_input=recomputes_input)
        if self._first < shape.layers:
            self._layers[-1].finish_backward(ledger)
        lora = shape.lora is not None and shape.lora.shared
        for number in reversed(range(self._first, shape.layers)):
            layer, adapts = self._layers[number], layers.has_adapter(shape, number)
            if self._starts_graph(number):
                if shape.recompute == "full":
                    layer.first_adapter_forward(ledger)
                    ledger.drop("activations", rows.d)
                layer.first_adapter_backward(ledger)
                continue
            if shape.recompute == "full":
                layer.recompute(ledger, adapts=adapts)
            shares = shape.layers - number > shape.own_layers  # weights of a layer above, whose gradient is held
            adds = self._add_weight if shares else weight
            layer.backward(
                ledger,
                adds if self._trained else ignore_weight,
                adapts=adapts,
                recomputed_input=self._recomputes_input(number),
                at_once=at_once,
                of_lora=adds if lora else ignore_weight,
            )
        if own is None:
            weight(ledger, shape.own - on_top, 0)
        if self._trained:
            layers.embeddings_backward(ledger, rows, weight, shape.table if own is None else 0, summed=own is None)
        elif below:
            ledger.drop("workspace", rows.d)

    def _hold_weight(self, ledger: Ledger, numbers: int, rows: int) -> None:
        """Hold the gradient of a weight that belongs to one task."""
        ledger.hold("gradients", numbers * self._shape.number_bytes)

    def _add_weight(self, ledger: Ledger, numbers: int, rows: int) -> None:
        """Add to a gradient that is held already: a product, unless it is added to J directly."""
        shape = self._shape
        if shape.joint or shape.storage != "stacked" or shape.j_bytes != shape.number_bytes:
            ledger.touch(numbers * shape.number_bytes)
