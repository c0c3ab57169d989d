"""Bytes that the LoRA of a layer's linear layers keeps, and its temporary memory."""

from __future__ import annotations

from collections.abc import Callable

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora_shape import LAYER_INPUT, LoraShape
from fastmtl.profile.shape import Shape

# Called for every parameter gradient with its number of elements and the bytes of dY, the output's
# gradient.
Weight = Callable[[Ledger, int, int], None]


def ignore_weight(ledger: Ledger, numbers: int, rows: int) -> None:
    """Do nothing: for frozen weights, and for the tasks' own, which are counted all together."""


def output_gradients(shape: Shape) -> int:
    """Return the numbers per token in the output gradients of a layer's shared Linears."""
    lora = shape.lora if shape.lora is not None and shape.lora.shared else None
    sizes = {LAYER_INPUT: 3 * shape.hidden, "attended": shape.hidden, "normed": shape.opened}
    sizes["activated"] = shape.hidden
    trained = set(sizes) if shape.encoder_trained else set() if lora is None else {site for site, *_ in lora.sites}
    return sum(sizes[site] for site in trained) + (0 if lora is None else lora.rank * len(lora.sites))


class LoraRows:
    """Bytes of a LoRA's tensors with a row per token; all zero without a LoRA.

    sites: the sites (lora_shape.SITES) at which a linear layer has a LoRA. keeps: those whose
    tensor is kept for the gradient of A; with dropout, a copy of it is kept instead.
    """

    def __init__(self, shape: Shape, lora: LoraShape | None) -> None:
        self._lora, tokens, number = lora, shape.load.tokens, shape.number_bytes
        self._pairs = () if lora is None else lora.sites
        self._row = tokens * number
        self.low = 0 if lora is None else self._row * lora.rank
        self._drops = lora is not None and lora.dropout
        self._outlives = lora is not None and lora.shared and shape.storage == "kept" and not shape.joint
        self.sites = frozenset(site for site, _, _ in self._pairs)
        self.keeps = frozenset[str]() if self._drops else self.sites

    @property
    def kept(self) -> int:
        """Bytes that a layer keeps: A dropout(x), and with dropout also dropout(x)."""
        return sum(self._kept(inner) for _, inner, _ in self._pairs)

    def outputs(self, site: str) -> int:
        """Return the bytes of the terms that are added to outputs at a site."""
        return sum(self._row * outer for at, _, outer in self._pairs if at == site)

    def forward(self, ledger: Ledger, site: str) -> None:
        """Hold what backward needs as activations."""
        for at, inner, outer in self._pairs:
            if at == site:
                ledger.hold("activations", self._kept(inner))
                ledger.touch(self._row * outer)

    def backward(self, ledger: Ledger, site: str, weight: Weight) -> None:
        """Compute the gradients of B, of A and of the input; drop or keep activations."""
        for at, inner, outer in self._pairs:
            if at == site:
                assert self._lora is not None
                weight(ledger, self._lora.rank * outer, self._row * outer)
                with ledger.holding(self.low):
                    weight(ledger, self._lora.rank * inner, self.low)
                    ledger.touch(self._row * inner * (2 if self._drops else 1))
                if self._outlives:
                    ledger.hold("task gradients", self.low)
                else:
                    ledger.drop("activations", self._kept(inner))

    def _kept(self, inner: int) -> int:
        return self.low + (self._row * inner if self._drops else 0)
