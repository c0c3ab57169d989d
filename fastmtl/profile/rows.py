"""Bytes of the tensors of a layer that have a row per token.

N tokens, d hidden, f intermediate, h heads, s the adapter's size. Rows of N x d numbers are counted
in the model's dtype, statistics in float32.
"""

from __future__ import annotations

from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import LoraRows
from fastmtl.profile.lora_shape import LoraShape
from fastmtl.profile.shape import Shape

FLOAT = 4


class Rows:
    """Bytes of tensors with a row per token: d, f, s for widths hidden, intermediate, adapter_size.

    o is for the outputs of the feed-forward part's first map, f or 2 f.
    keeps_inputs: linear layers keep their inputs. shared: surgery needs the layers' gradients.
    lora: the LoRA of the layer, or None.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        keeps_inputs: bool,
        adapter_size: int = 0,
        shared: bool = False,
        lora: LoraShape | None = None,
    ) -> None:
        tokens, number = shape.load.tokens, shape.number_bytes
        self.shape = shape
        self.keeps_inputs = keeps_inputs
        self.lora = LoraRows(shape, lora)
        # With `storage: kept`, tensors of shared layers outlive their backward.
        kept = shape.storage == "kept" and not shape.joint
        self.outlive = shared and kept
        self.sites_outlive = self.lora.sites if kept and lora is not None and lora.shared else frozenset[str]()
        self.recomputes = shape.recompute == "cheap"
        self.d = tokens * shape.hidden * number
        self.e = tokens * shape.embedding * number
        self.f = tokens * shape.intermediate * number
        self.o = tokens * shape.opened * number
        self.s = tokens * adapter_size * number
        # fastmtl_kernels.varlen_attention.cpp: maximum and sum per row and head.
        self.attention_stats = tokens * shape.heads * 2 * FLOAT
        self.adapter_stats = 0 if shape.adapter is None else tokens * shape.adapter.heads * 2 * FLOAT
        # fastmtl_kernels.add_layer_norm.cpp: mean, rstd, and one bit per element for dropout.
        self.norm_stats = tokens * 2 * FLOAT
        # fastmtl.model.encoder.deberta: relative positions after dropout, and each projection of
        # them; a copy for each task while there are gradients per task.
        copies = shape.tasks if shared and not shape.joint else 1
        distances = copies * min(max(2 * shape.load.longest - 1, 0), shape.distances)
        self.relative = distances * shape.hidden * number * (shape.terms + (shape.dropout and shape.terms > 0))
        mask = tokens * -(-shape.hidden // 64) * 8
        self.masks = tuple(mask if dropout else 0 for dropout in shape.sublayer_dropouts)
        # fastmtl.surgery.rules.projections: a copy of three weights that are not adjacent in a flat
        # buffer.
        self.projections = 0 if shape.zero in (1, 2) else 3 * shape.hidden**2 * number

    def input(self, nbytes: int, site: str) -> int:
        """Return the bytes that a linear layer keeps of its input.

        A frozen one needs none, but the matrix A of its LoRA does.
        """
        return nbytes if self.keeps_inputs or site in self.lora.keeps else 0

    def result(self, nbytes: int, site: str) -> int:
        """Return the bytes that a Linear keeps of an input from LayerNorm or the activation."""
        return 0 if self.recomputes else self.input(nbytes, site)

    def recomputed(self, nbytes: int, site: str) -> int:
        """Return the bytes that backward recomputes of an input from LayerNorm or activation."""
        return self.input(nbytes, site) - self.result(nbytes, site)

    def norm(self, which: int) -> int:
        """Return the bytes that add_layer_norm keeps: z, statistics, mask.

        which: 0 for that of the attention part, 1 for that of the feed-forward part. The next layer
        keeps its output.
        """
        return self.d + self.norm_stats + self.masks[which]

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


def drop_output_gradient(ledger: Ledger, rows: Rows, nbytes: int, site: str) -> None:
    """Drop a Linear's output gradient, held as workspace, or keep it for surgery."""
    ledger.drop("workspace", nbytes)
    ledger.hold("task gradients", nbytes if rows.outlive or site in rows.sites_outlive else 0)


def drop_input(ledger: Ledger, rows: Rows, nbytes: int, held: int, site: str) -> None:
    """Drop a Linear's input, held as activations or recomputed, or keep it for surgery."""
    ledger.drop("activations", held)
    stays = rows.outlive or (site in rows.sites_outlive and site in rows.lora.keeps)
    ledger.hold("activations", nbytes if stays else 0)


def norm_backward(ledger: Ledger, rows: Rows, which: int) -> None:
    """Replace dy by dz, and with dropout by dz and dx; drop z, its statistics and mask."""
    ledger.hold("workspace", 2 * rows.d if rows.masks[which] else rows.d)
    ledger.drop("workspace", rows.d)
    ledger.drop("activations", rows.norm(which))


def adapter_backward(ledger: Ledger, rows: Rows) -> None:
    adapter, number = rows.shape.adapter, rows.shape.number_bytes
    assert adapter is not None
    derived = rows.d if adapter.dropout or (adapter.gelu and adapter.name == "pal") else 0
    with ledger.holding(derived):
        ledger.touch(5 * rows.s + adapter.shared * number if adapter.name == "pal" else 2 * rows.s)
    with ledger.holding(rows.s):
        ledger.touch(rows.d + adapter.shared * number)
