"""What each module of the encoder keeps for backward, and what it needs for a moment; in bytes.

Each function tells one module's forward or backward to a ledger, allocation by allocation, in the order of the code it
stands for. N tokens, d hidden, f intermediate, h heads, s the adapter's size, B sequences. Rows of N x d numbers are
counted in the model's dtype, statistics in float32.
"""

from __future__ import annotations

from collections.abc import Callable

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.shape import Shape

FLOAT = 4
INT64 = 8
# Vectors [B, d] that pooling and a head keep: pooled, sliced by task, after dropout with its mask, features.
HEAD_VECTORS = 5

# Told of every parameter whose gradient a backward has: its numbers, and bytes of the rows dY that it comes from.
Weight = Callable[[Ledger, int, int], None]


class Rows:
    """Bytes of rows of a micro-batch, in layers that are trained or frozen, with an adapter beside them or not.

    shared: whether the layers are all tasks', so that surgery wants their gradients.
    """

    def __init__(self, shape: Shape, *, keeps_inputs: bool, adapter_size: int = 0, shared: bool = False) -> None:
        tokens, number = shape.load.tokens, shape.number_bytes
        self.shape = shape
        self.keeps_inputs = keeps_inputs
        # What `storage: kept` keeps of shared layers outlives their backward.
        self.outlive = shared and shape.storage == "kept" and not shape.joint
        self.remakes = shape.recompute == "cheap"
        self.d = tokens * shape.hidden * number
        self.f = tokens * shape.intermediate * number
        self.s = tokens * adapter_size * number
        # fastmtl_kernels.varlen_attention.cpp: maximum and sum of every row and head.
        self.attention_stats = tokens * shape.heads * 2 * FLOAT
        self.adapter_stats = 0 if shape.adapter is None else tokens * shape.adapter.heads * 2 * FLOAT
        # fastmtl_kernels.add_layer_norm.cpp: mean, rstd, and a bit for each element that dropout may drop.
        self.norm_stats = tokens * 2 * FLOAT
        self.mask = tokens * -(-shape.hidden // 64) * 8 if shape.dropout else 0
        # fastmtl.surgery.rules.projections: a copy of three weights that do not follow one another in a flat buffer.
        self.projections = 0 if shape.zero in (1, 2) else 3 * shape.hidden**2 * number

    def input(self, nbytes: int) -> int:
        """Of what a linear layer reads, the bytes that it keeps: a frozen one needs none."""
        return nbytes if self.keeps_inputs else 0

    def result(self, nbytes: int) -> int:
        """The same of what LayerNorm or the activation returned."""
        return 0 if self.remakes else self.input(nbytes)

    def again(self, nbytes: int) -> int:
        """Of such a result, the bytes that backward makes again."""
        return self.input(nbytes) - self.result(nbytes)

    @property
    def norm(self) -> int:
        """add_layer_norm keeps z, its statistics and mask; what it returns is kept by what reads it."""
        return self.d + self.norm_stats + self.mask

    @property
    def layer(self) -> int:
        """q, k, v side by side and attention's output; two norms and what the first returns; before and after the
        activation. Without the layer's input and output.
        """
        attention = 3 * self.d + self.attention_stats + self.input(self.d)
        return attention + 2 * self.norm + self.result(self.d) + self.f + self.result(self.f)

    @property
    def kept(self) -> int:
        """Of each layer between forward and backward, with its input, which is another's output."""
        return self.d if self.shape.recompute == "full" else self.layer + self.result(self.d)

    @property
    def pal(self) -> int:
        """V_E h, q, k, v, attention's output, and with an activation what comes before it."""
        adapter = self.shape.adapter
        return 5 * self.s + self.adapter_stats + (self.d if adapter is not None and adapter.gelu else 0)

    @property
    def adapter(self) -> int:
        """Beside one layer that carries it."""
        adapter = self.shape.adapter
        if adapter is None or adapter.name == "none":
            return 0
        return self.pal if adapter.name == "pal" else self.s * (2 if adapter.gelu else 1)


def carries(shape: Shape, layer: int) -> bool:
    """Whether a layer has an adapter. Which ones do changes the peak by less than a layer's adapter: the last ones."""
    return shape.adapter is not None and layer >= shape.layers - shape.adapter.layers


def embeddings_forward(ledger: Ledger, rows: Rows, *, trained: bool) -> None:
    """Their output is held as activations afterwards."""
    with ledger.holding(2 * rows.d):
        ledger.hold("activations", rows.d if trained else 0)  # the sum of the tables' rows: what LayerNorm keeps
    with ledger.holding(rows.d if rows.shape.dropout else 0):
        ledger.hold("activations", rows.d)


def embeddings_backward(ledger: Ledger, rows: Rows, weight: Weight, table: int, *, summed: bool) -> None:
    """From dy, which is held as workspace, and drops it. table: numbers of the word embeddings' dense gradient. summed:
    whether the tables' gradients go to the parameters: then rows, weighted or in 16 bits, are added up in float32.
    """
    shape = rows.shape
    ledger.touch(2 * rows.d)
    ledger.drop("activations", rows.d)
    narrow = shape.number_bytes < FLOAT
    weighted = not shape.joint and shape.storage == "replay"
    with ledger.holding(rows.d):
        for numbers in (table, shape.positions * shape.hidden, shape.types * shape.hidden):
            if not summed:
                weight(ledger, numbers, rows.d)
                continue
            wide = shape.load.tokens * shape.hidden * FLOAT * (narrow + weighted)
            with ledger.holding(wide + (numbers * FLOAT if narrow else 0)):
                weight(ledger, numbers, 0)
    ledger.drop("workspace", rows.d)


def layer_without_graph(ledger: Ledger, rows: Rows) -> None:
    """A frozen layer with nothing trained below it: its output takes the place of its input."""
    ledger.touch(max(3 * rows.d + rows.projections, 4 * rows.d + rows.attention_stats, rows.d + 2 * rows.f))


def first_adapter_forward(ledger: Ledger, rows: Rows) -> None:
    """The first layer of a frozen encoder that has an adapter: only what the adapter adds is in the graph."""
    ledger.hold("activations", rows.adapter)
    with ledger.holding(rows.d):
        layer_without_graph(ledger, rows)
        with ledger.holding(2 * rows.d):
            ledger.hold("activations", rows.norm + rows.d)


def first_adapter_backward(ledger: Ledger, rows: Rows) -> None:
    _norm_backward(ledger, rows, 1 if rows.mask else 0)
    ledger.drop("workspace", rows.d if rows.mask else 0)
    _adapter_backward(ledger, rows)
    ledger.drop("activations", rows.adapter + rows.d)


def layer_forward(ledger: Ledger, rows: Rows, *, adapts: bool) -> None:
    """The layer's input is held as activations, its output will be beside it."""
    if adapts:
        ledger.hold("activations", rows.adapter)
    with ledger.holding(rows.d if adapts else 0):
        with ledger.holding(rows.projections):
            ledger.hold("activations", 3 * rows.d)
        with ledger.holding(rows.d - rows.input(rows.d)):
            ledger.hold("activations", rows.input(rows.d) + rows.attention_stats)
            ledger.touch(rows.d)
        with ledger.holding(rows.d):
            ledger.hold("activations", rows.norm + rows.result(rows.d))
        with ledger.holding(rows.d - rows.result(rows.d)):
            ledger.hold("activations", rows.f)
            with ledger.holding(rows.f - rows.result(rows.f)):
                ledger.hold("activations", rows.result(rows.f))
                with ledger.holding(rows.d):
                    ledger.hold("activations", rows.norm + rows.d)


def layer_backward(
    ledger: Ledger, rows: Rows, weight: Weight, *, adapts: bool, again: bool, at_once: bool = False
) -> None:
    """From dy, which is held as workspace; the gradient of the layer's input is held in its place afterwards.

    What the layer and its adapter hold as activations is dropped, with the layer's input and without its output.
    again: whether the input is not held, but made again. at_once: whether the gradients of the weights of q, k and v
    are one product.
    """
    hidden, intermediate = rows.shape.hidden, rows.shape.intermediate
    d, f = rows.d, rows.f
    split = 1 if rows.mask else 0  # without dropout dx is dz
    # The second norm: dz goes to the residual and the adapter, dx to the dense layer.
    _norm_backward(ledger, rows, split)
    # output.dense
    with ledger.holding(rows.again(f)):
        ledger.hold("workspace", f)
        weight(ledger, hidden * intermediate, d)
        _end_of_gradient(ledger, rows, split * d)
    _end_of_input(ledger, rows, f, rows.result(f))
    # The activation.
    ledger.hold("workspace", f)
    ledger.drop("workspace", f)
    ledger.drop("activations", f)
    # intermediate.dense, whose input meets the residual.
    with ledger.holding(rows.again(d)):
        ledger.hold("workspace", d)
        weight(ledger, hidden * intermediate, f)
        _end_of_gradient(ledger, rows, f)
    _end_of_input(ledger, rows, d, rows.result(d))
    keeps_dz = rows.outlive and not split
    if adapts or keeps_dz:
        ledger.touch(d)  # dz is still to be read, so it is not added to in place
    if not adapts:
        ledger.drop("workspace", d)
    ledger.hold("task gradients", d if keeps_dz else 0)
    # The first norm.
    _norm_backward(ledger, rows, split)
    # attention.output.dense
    ledger.hold("workspace", d)
    weight(ledger, hidden * hidden, d)
    _end_of_gradient(ledger, rows, split * d)
    _end_of_input(ledger, rows, d, rows.input(d))
    # Attention: all of q, k, v at once.
    ledger.hold("workspace", 3 * d)
    ledger.drop("workspace", d)
    ledger.drop("activations", 3 * d + rows.attention_stats)
    ledger.hold("workspace", d if again else 0)
    ledger.hold("workspace", d)
    ledger.touch(rows.projections)
    for _ in range(1 if at_once else 3):
        weight(ledger, (3 if at_once else 1) * hidden * hidden, 3 * d if at_once else d)
    _end_of_gradient(ledger, rows, 3 * d)
    if keeps_dz:
        ledger.touch(d)
    ledger.drop("workspace", d)
    ledger.hold("task gradients", d if keeps_dz else 0)
    if adapts:
        _adapter_backward(ledger, rows)
        ledger.drop("activations", rows.adapter)
        ledger.drop("workspace", d)
    ledger.drop("workspace", d if again else 0)
    _end_of_input(ledger, rows, d, 0 if again else d)


def _end_of_gradient(ledger: Ledger, rows: Rows, nbytes: int) -> None:
    """Of what a Linear's weight gradient is made from, held as workspace."""
    ledger.drop("workspace", nbytes)
    ledger.hold("task gradients", nbytes if rows.outlive else 0)


def _end_of_input(ledger: Ledger, rows: Rows, nbytes: int, held: int) -> None:
    """Of what a Linear has read, held as activations or made again."""
    ledger.drop("activations", held)
    ledger.hold("activations", nbytes if rows.outlive else 0)


def layer_again(ledger: Ledger, rows: Rows, *, adapts: bool) -> None:
    """With `recompute: full`: a layer's forward once more, up to the last thing that its backward needs."""
    layer_forward(ledger, rows, adapts=adapts)
    ledger.drop("activations", rows.d)


def _norm_backward(ledger: Ledger, rows: Rows, split: int) -> None:
    """dy becomes dz, and with dropout dx beside it; z, its statistics and mask are dropped."""
    ledger.hold("workspace", (1 + split) * rows.d)
    ledger.drop("workspace", rows.d)
    ledger.drop("activations", rows.norm)


def _adapter_backward(ledger: Ledger, rows: Rows) -> None:
    adapter, number = rows.shape.adapter, rows.shape.number_bytes
    assert adapter is not None
    derived = rows.d if adapter.dropout or (adapter.gelu and adapter.name == "pal") else 0
    with ledger.holding(derived):
        ledger.touch(5 * rows.s + adapter.shared * number if adapter.name == "pal" else 2 * rows.s)
    with ledger.holding(rows.s):
        ledger.touch(rows.d + adapter.shared * number)


def pal_on_top_forward(ledger: Ledger, rows: Rows) -> None:
    """h + V_D MHA(V_E h): the layers' output is held, what comes out of it will be beside it."""
    ledger.hold("activations", rows.pal)
    with ledger.holding(rows.d):
        ledger.hold("activations", rows.d)


def pal_on_top_backward(ledger: Ledger, rows: Rows, *, again: bool) -> None:
    """dy, held as workspace, goes on with what the projections add to it. again: as in layer_backward."""
    ledger.touch(5 * rows.s)
    ledger.touch(rows.s + (3 if again else 2) * rows.d)
    ledger.drop("activations", rows.pal + (0 if again else rows.d))


def heads_forward(ledger: Ledger, rows: Rows) -> None:
    """After the last layer, whose output only pooling reads and does not keep."""
    shape = rows.shape
    ledger.drop("activations", rows.d)
    with ledger.holding(rows.d):
        ledger.hold("activations", _head_bytes(shape))


def heads_backward(ledger: Ledger, rows: Rows, *, below: bool) -> None:
    """Ends with dy of the last layer's output held as workspace, if something below is trained."""
    ledger.drop("activations", _head_bytes(rows.shape))
    ledger.hold("workspace", rows.d if below else 0)


def _head_bytes(shape: Shape) -> int:
    return HEAD_VECTORS * shape.load.sequences * shape.hidden * shape.number_bytes
