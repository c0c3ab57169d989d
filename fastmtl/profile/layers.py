"""Bytes that each module of the encoder keeps for backward, and its temporary memory.

Each function simulates one module's forward or backward on a ledger, in the order of the module's
allocations. N tokens, d hidden, f intermediate, h heads, s the adapter's size, B sequences. Rows of
N x d numbers are counted in the model's dtype, statistics in float32.
"""

from __future__ import annotations

from collections.abc import Callable

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.shape import Shape

FLOAT = 4
INT64 = 8
# Vectors [B, d] of pooling and a head: pooled, sliced by task, dropout's output and mask, features.
HEAD_VECTORS = 5

# Called for every parameter gradient with its number of elements and the bytes of dY, the output's
# gradient.
Weight = Callable[[Ledger, int, int], None]


class Rows:
    """Bytes of tensors with a row per token: d, f, s for widths hidden, intermediate, adapter_size.

    keeps_inputs: linear layers keep their inputs. shared: surgery needs the layers' gradients.
    """

    def __init__(self, shape: Shape, *, keeps_inputs: bool, adapter_size: int = 0, shared: bool = False) -> None:
        tokens, number = shape.load.tokens, shape.number_bytes
        self.shape = shape
        self.keeps_inputs = keeps_inputs
        # With `storage: kept`, tensors of shared layers outlive their backward.
        self.outlive = shared and shape.storage == "kept" and not shape.joint
        self.recomputes = shape.recompute == "cheap"
        self.d = tokens * shape.hidden * number
        self.e = tokens * shape.embedding * number
        self.f = tokens * shape.intermediate * number
        self.s = tokens * adapter_size * number
        # fastmtl_kernels.varlen_attention.cpp: maximum and sum per row and head.
        self.attention_stats = tokens * shape.heads * 2 * FLOAT
        self.adapter_stats = 0 if shape.adapter is None else tokens * shape.adapter.heads * 2 * FLOAT
        # fastmtl_kernels.add_layer_norm.cpp: mean, rstd, and one bit per element for dropout.
        self.norm_stats = tokens * 2 * FLOAT
        mask = tokens * -(-shape.hidden // 64) * 8
        self.masks = tuple(mask if dropout else 0 for dropout in shape.sublayer_dropouts)
        # fastmtl.surgery.rules.projections: a copy of three weights that are not adjacent in a flat
        # buffer.
        self.projections = 0 if shape.zero in (1, 2) else 3 * shape.hidden**2 * number

    def input(self, nbytes: int) -> int:
        """Return the bytes that a linear layer keeps of its input; a frozen one needs none."""
        return nbytes if self.keeps_inputs else 0

    def result(self, nbytes: int) -> int:
        """Return the bytes that a Linear keeps of an input from LayerNorm or the activation."""
        return 0 if self.recomputes else self.input(nbytes)

    def recomputed(self, nbytes: int) -> int:
        """Return the bytes that backward recomputes of an input from LayerNorm or activation."""
        return self.input(nbytes) - self.result(nbytes)

    def norm(self, which: int) -> int:
        """Return the bytes that add_layer_norm keeps: z, statistics, mask.

        which: 0 for that of the attention part, 1 for that of the feed-forward part. The next layer
        keeps its output.
        """
        return self.d + self.norm_stats + self.masks[which]

    @property
    def layer(self) -> int:
        """Bytes of q, k, v, attention's output, norms, a norm's output, activation in and out."""
        attention = 3 * self.d + self.attention_stats + self.input(self.d)
        return attention + self.norm(0) + self.norm(1) + self.result(self.d) + self.f + self.result(self.f)

    @property
    def kept(self) -> int:
        """Bytes that a layer keeps from forward to backward, including its input."""
        return self.d if self.shape.recompute == "full" else self.layer + self.result(self.d)

    @property
    def pal(self) -> int:
        """Bytes that PAL keeps: V_E h, q, k, v, attention's output, and an activation's input."""
        adapter = self.shape.adapter
        return 5 * self.s + self.adapter_stats + (self.d if adapter is not None and adapter.gelu else 0)

    @property
    def adapter(self) -> int:
        """Bytes that the adapter beside one layer keeps."""
        adapter = self.shape.adapter
        if adapter is None or adapter.name == "none":
            return 0
        return self.pal if adapter.name == "pal" else self.s * (2 if adapter.gelu else 1)


def has_adapter(shape: Shape, layer: int) -> bool:
    """Return whether a layer has an adapter, counted from the top (error: below one adapter)."""
    return shape.adapter is not None and layer >= shape.layers - shape.adapter.layers


def embeddings_forward(ledger: Ledger, rows: Rows, *, trained: bool) -> None:
    """Hold the embeddings' output as activations."""
    with ledger.holding(2 * rows.e):
        ledger.hold("activations", rows.e if trained else 0)  # the sum of the tables' rows, kept by LayerNorm
    with ledger.holding(rows.e if rows.shape.dropout else 0):
        ledger.hold("activations", rows.e)
    if rows.shape.projects:
        ledger.hold("activations", rows.d)
        ledger.drop("activations", rows.e - rows.input(rows.e))


def embeddings_backward(ledger: Ledger, rows: Rows, weight: Weight, table: int, *, summed: bool) -> None:
    """Compute the tables' gradients, and drop dy, held as workspace.

    table: the size of the word table's dense gradient. summed: the gradients go to the parameters;
    rows that are weighted or in 16 bits are then added in float32.
    """
    shape = rows.shape
    if shape.projects:
        ledger.hold("workspace", rows.e)
        weight(ledger, shape.embedding * shape.hidden, rows.d)
        _drop_output_gradient(ledger, rows, rows.d)
        _drop_input(ledger, rows, rows.e, rows.input(rows.e))
    ledger.touch(2 * rows.e)
    ledger.drop("activations", rows.e)
    narrow = shape.number_bytes < FLOAT
    weighted = not shape.joint and shape.storage == "replay"
    with ledger.holding(rows.e):
        for numbers in (table, shape.positions * shape.embedding, shape.types * shape.embedding):
            if not summed:
                weight(ledger, numbers, rows.e)
                continue
            wide = shape.load.tokens * shape.embedding * FLOAT * (narrow + weighted)
            with ledger.holding(wide + (numbers * FLOAT if narrow else 0)):
                weight(ledger, numbers, 0)
    ledger.drop("workspace", rows.e)


def layer_without_graph(ledger: Ledger, rows: Rows) -> None:
    """Run a frozen layer with nothing trained below it: its output replaces its input."""
    ledger.touch(max(3 * rows.d + rows.projections, 4 * rows.d + rows.attention_stats, rows.d + 2 * rows.f))


def first_adapter_forward(ledger: Ledger, rows: Rows) -> None:
    """Run a frozen encoder's first layer with an adapter; only the adapter's part needs a graph."""
    ledger.hold("activations", rows.adapter)
    with ledger.holding(rows.d):
        layer_without_graph(ledger, rows)
        with ledger.holding(2 * rows.d):
            ledger.hold("activations", rows.norm(1) + rows.d)


def first_adapter_backward(ledger: Ledger, rows: Rows) -> None:
    _norm_backward(ledger, rows, 1)
    ledger.drop("workspace", rows.d if rows.masks[1] else 0)
    _adapter_backward(ledger, rows)
    ledger.drop("activations", rows.adapter + rows.d)


def layer_forward(ledger: Ledger, rows: Rows, *, adapts: bool) -> None:
    """Hold the layer's output as activations, beside its input."""
    if adapts:
        ledger.hold("activations", rows.adapter)
    with ledger.holding(rows.d if adapts else 0):
        with ledger.holding(rows.projections):
            ledger.hold("activations", 3 * rows.d)
        with ledger.holding(rows.d - rows.input(rows.d)):
            ledger.hold("activations", rows.input(rows.d) + rows.attention_stats)
            ledger.touch(rows.d)
        with ledger.holding(rows.d):
            ledger.hold("activations", rows.norm(0) + rows.result(rows.d))
        with ledger.holding(rows.d - rows.result(rows.d)):
            ledger.hold("activations", rows.f)
            with ledger.holding(rows.f - rows.result(rows.f)):
                ledger.hold("activations", rows.result(rows.f))
                with ledger.holding(rows.d):
                    ledger.hold("activations", rows.norm(1) + rows.d)


def layer_backward(
    ledger: Ledger, rows: Rows, weight: Weight, *, adapts: bool, recomputed_input: bool, at_once: bool = False
) -> None:
    """Replace dy, held as workspace, by the gradient of the layer's input; drop activations.

    The layer's input is dropped, its output is not. recomputed_input: the input is recomputed, not
    held. at_once: the gradients of the weights of q, k and v are one product.
    """
    hidden, intermediate = rows.shape.hidden, rows.shape.intermediate
    d, f = rows.d, rows.f
    # Without dropout, dx and dz are one tensor.
    split, split_first = (1 if rows.masks[1] else 0), (1 if rows.masks[0] else 0)
    # The second norm: dz goes to the residual and the adapter, dx to the dense layer.
    _norm_backward(ledger, rows, 1)
    # output.dense
    with ledger.holding(rows.recomputed(f)):
        ledger.hold("workspace", f)
        weight(ledger, hidden * intermediate, d)
        _drop_output_gradient(ledger, rows, split * d)
    _drop_input(ledger, rows, f, rows.result(f))
    # The activation.
    ledger.hold("workspace", f)
    ledger.drop("workspace", f)
    ledger.drop("activations", f)
    # intermediate.dense, whose input is also the residual.
    with ledger.holding(rows.recomputed(d)):
        ledger.hold("workspace", d)
        weight(ledger, hidden * intermediate, f)
        _drop_output_gradient(ledger, rows, f)
    _drop_input(ledger, rows, d, rows.result(d))
    keeps_dz = rows.outlive and not split
    if adapts or keeps_dz:
        ledger.touch(d)  # dz is read later, so it is not added to in place
    if not adapts:
        ledger.drop("workspace", d)
    ledger.hold("task gradients", d if keeps_dz else 0)
    # The first norm.
    _norm_backward(ledger, rows, 0)
    keeps_dz = rows.outlive and not split_first
    # attention.output.dense
    ledger.hold("workspace", d)
    weight(ledger, hidden * hidden, d)
    _drop_output_gradient(ledger, rows, split_first * d)
    _drop_input(ledger, rows, d, rows.input(d))
    # Attention: all of q, k, v at once.
    ledger.hold("workspace", 3 * d)
    ledger.drop("workspace", d)
    ledger.drop("activations", 3 * d + rows.attention_stats)
    ledger.hold("workspace", d if recomputed_input else 0)
    ledger.hold("workspace", d)
    ledger.touch(rows.projections)
    for _ in range(1 if at_once else 3):
        weight(ledger, (3 if at_once else 1) * hidden * hidden, 3 * d if at_once else d)
    _drop_output_gradient(ledger, rows, 3 * d)
    if keeps_dz:
        ledger.touch(d)
    ledger.drop("workspace", d)
    ledger.hold("task gradients", d if keeps_dz else 0)
    if adapts:
        _adapter_backward(ledger, rows)
        ledger.drop("activations", rows.adapter)
        ledger.drop("workspace", d)
    ledger.drop("workspace", d if recomputed_input else 0)
    _drop_input(ledger, rows, d, 0 if recomputed_input else d)


def _drop_output_gradient(ledger: Ledger, rows: Rows, nbytes: int) -> None:
    """Drop a Linear's output gradient, held as workspace, or keep it for surgery."""
    ledger.drop("workspace", nbytes)
    ledger.hold("task gradients", nbytes if rows.outlive else 0)


def _drop_input(ledger: Ledger, rows: Rows, nbytes: int, held: int) -> None:
    """Drop a Linear's input, held as activations or recomputed, or keep it for surgery."""
    ledger.drop("activations", held)
    ledger.hold("activations", nbytes if rows.outlive else 0)


def recompute_layer(ledger: Ledger, rows: Rows, *, adapts: bool) -> None:
    """Run forward again in backward (`recompute: full`), up to the last tensor that is needed."""
    layer_forward(ledger, rows, adapts=adapts)
    ledger.drop("activations", rows.d)


def _norm_backward(ledger: Ledger, rows: Rows, which: int) -> None:
    """Replace dy by dz, and with dropout by dz and dx; drop z, its statistics and mask."""
    ledger.hold("workspace", 2 * rows.d if rows.masks[which] else rows.d)
    ledger.drop("workspace", rows.d)
    ledger.drop("activations", rows.norm(which))


def _adapter_backward(ledger: Ledger, rows: Rows) -> None:
    adapter, number = rows.shape.adapter, rows.shape.number_bytes
    assert adapter is not None
    derived = rows.d if adapter.dropout or (adapter.gelu and adapter.name == "pal") else 0
    with ledger.holding(derived):
        ledger.touch(5 * rows.s + adapter.shared * number if adapter.name == "pal" else 2 * rows.s)
    with ledger.holding(rows.s):
        ledger.touch(rows.d + adapter.shared * number)


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


def heads_forward(ledger: Ledger, rows: Rows) -> None:
    """Run pooling and heads after the last layer, whose output is not kept."""
    shape = rows.shape
    ledger.drop("activations", rows.d)
    with ledger.holding(rows.d):
        ledger.hold("activations", _head_bytes(shape))


def heads_backward(ledger: Ledger, rows: Rows, *, below: bool) -> None:
    """Hold dy of the last layer's output as workspace, if something below is trained."""
    ledger.drop("activations", _head_bytes(rows.shape))
    ledger.hold("workspace", rows.d if below else 0)


def _head_bytes(shape: Shape) -> int:
    return HEAD_VECTORS * shape.load.sequences * shape.hidden * shape.number_bytes
