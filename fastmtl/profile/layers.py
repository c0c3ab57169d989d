"""Bytes that each module of the encoder keeps for backward, and its temporary memory.

Each function simulates one module's forward or backward on a ledger, in the order of the module's
allocations. N tokens, d hidden, f intermediate, h heads, s the adapter's size, B sequences. Rows of
N x d numbers are counted in the model's dtype, statistics in float32.
"""

from __future__ import annotations

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight, ignore_weight
from fastmtl.profile.lora_shape import LAYER_INPUT
from fastmtl.profile.rows import FLOAT, Rows
from fastmtl.profile.shape import Shape

INT64 = 8
# Vectors [B, d] of pooling and a head: pooled, sliced by task, dropout's output and mask, features.
HEAD_VECTORS = 5
EMBEDDED = "embedded"  # input of the embeddings' projection


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
        ledger.drop("activations", rows.e - rows.input(rows.e, EMBEDDED))


def embeddings_backward(ledger: Ledger, rows: Rows, weight: Weight, table: int, *, summed: bool) -> None:
    """Compute the tables' gradients, and drop dy, held as workspace.

    table: the size of the word table's dense gradient. summed: the gradients go to the parameters;
    rows that are weighted or in 16 bits are then added in float32.
    """
    shape = rows.shape
    if shape.projects:
        ledger.hold("workspace", rows.e)
        weight(ledger, shape.embedding * shape.hidden, rows.d)
        _drop_output_gradient(ledger, rows, rows.d, EMBEDDED)
        _drop_input(ledger, rows, rows.e, rows.input(rows.e, EMBEDDED), EMBEDDED)
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
    inside = (2 if rows.shape.gated else 1) * rows.d + rows.o + rows.f + rows.undropped
    ledger.touch(max(3 * rows.d + rows.projections, 4 * rows.d + rows.attention_stats, inside))


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
            ledger.hold("activations", rows.o)
            ledger.touch(rows.f + rows.undropped)
            rows.lora.forward(ledger, "normed")
            with ledger.holding(rows.f - activated):
                ledger.hold("activations", activated)
                rows.lora.forward(ledger, "activated")
                with ledger.holding(rows.d):
                    ledger.hold("activations", rows.norm(1) + rows.d)


def layer_backward(
    ledger: Ledger,
    rows: Rows,
    weight: Weight,
    *,
    adapts: bool,
    recomputed_input: bool,
    at_once: bool = False,
    of_lora: Weight = ignore_weight,
) -> None:
    """Replace dy, held as workspace, by the gradient of the layer's input; drop activations.

    The layer's input is dropped, its output is not. recomputed_input: the input is recomputed, not
    held. at_once: the gradients of the weights of q, k and v are one product. of_lora: called in
    place of `weight` for the matrices of a LoRA.
    """
    hidden, intermediate, opened = rows.shape.hidden, rows.shape.intermediate, rows.shape.opened
    d, f, o = rows.d, rows.f, rows.o
    # Without dropout, dx and dz are one tensor.
    split, split_first = (1 if rows.masks[1] else 0), (1 if rows.masks[0] else 0)
    # The second norm: dz goes to the residual and the adapter, dx to the dense layer.
    _norm_backward(ledger, rows, 1)
    # output.dense
    with ledger.holding(rows.recomputed(f, "activated")):
        rows.lora.backward(ledger, "activated", of_lora)
        ledger.hold("workspace", f)
        weight(ledger, hidden * intermediate, d)
        _drop_output_gradient(ledger, rows, split * d, "activated")
    _drop_input(ledger, rows, f, rows.result(f, "activated"), "activated")
    # The activation.
    ledger.hold("workspace", o)
    ledger.drop("workspace", f)
    ledger.drop("activations", o)
    # intermediate.dense, whose input is also the residual.
    with ledger.holding(rows.recomputed(d, "normed")):
        rows.lora.backward(ledger, "normed", of_lora)
        ledger.hold("workspace", d)
        weight(ledger, hidden * opened, o)
        _drop_output_gradient(ledger, rows, o, "normed")
    _drop_input(ledger, rows, d, rows.result(d, "normed"), "normed")
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
    rows.lora.backward(ledger, "attended", of_lora)
    ledger.hold("workspace", d)
    weight(ledger, hidden * hidden, d)
    _drop_output_gradient(ledger, rows, split_first * d, "attended")
    _drop_input(ledger, rows, d, rows.input(d, "attended"), "attended")
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
    _drop_output_gradient(ledger, rows, 3 * d, LAYER_INPUT)
    if keeps_dz:
        ledger.touch(d)
    ledger.drop("workspace", d)
    ledger.hold("task gradients", d if keeps_dz else 0)
    if adapts:
        _adapter_backward(ledger, rows)
        ledger.drop("activations", rows.adapter)
        ledger.drop("workspace", d)
    ledger.drop("workspace", d if recomputed_input else 0)
    _drop_input(ledger, rows, d, 0 if recomputed_input else d, LAYER_INPUT)


def _drop_output_gradient(ledger: Ledger, rows: Rows, nbytes: int, site: str) -> None:
    """Drop a Linear's output gradient, held as workspace, or keep it for surgery."""
    ledger.drop("workspace", nbytes)
    ledger.hold("task gradients", nbytes if rows.outlive or site in rows.sites_outlive else 0)


def _drop_input(ledger: Ledger, rows: Rows, nbytes: int, held: int, site: str) -> None:
    """Drop a Linear's input, held as activations or recomputed, or keep it for surgery."""
    ledger.drop("activations", held)
    stays = rows.outlive or (site in rows.sites_outlive and site in rows.lora.keeps)
    ledger.hold("activations", nbytes if stays else 0)


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
