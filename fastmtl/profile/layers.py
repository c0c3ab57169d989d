"""Memory of the parts around the encoder's layers: embeddings, pooling and heads.

Each function simulates a forward or backward on a ledger, in the order of the allocations.
"""

from __future__ import annotations

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight
from fastmtl.profile.rows import FLOAT, Rows, drop_input, drop_output_gradient
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
        drop_output_gradient(ledger, rows, rows.d, EMBEDDED)
        drop_input(ledger, rows, rows.e, rows.input(rows.e, EMBEDDED), EMBEDDED)
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
    pooled = HEAD_VECTORS * shape.load.sequences * shape.hidden * shape.number_bytes
    pieces = ((shape.load.units, shape.unit_bytes), (shape.load.cells, shape.cell_bytes))
    return pooled + sum(n * kept for numbers, nbytes in pieces for n, kept in zip(numbers, nbytes, strict=False))
