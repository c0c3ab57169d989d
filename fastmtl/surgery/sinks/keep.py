"""`storage: kept`: the sink that keeps the factors of task gradients in place of their products.

A Linear's task gradients are the T products dW_t = dY[rows of t]^T X[rows of t]. The sink keeps the
factors X and dY: N (in + out) numbers for N rows, in place of T x out x in. After backward, it
computes the T products of one weight after the other, and adds their inner products to the Gramian.
Given the task weights c, the merged gradient is one more product: (c[task of row] * dY)^T X.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.source import MergingSink
from fastmtl_kernels import combine, gramian
from fastmtl_kernels.cast import cast


class Pair(NamedTuple):
    """The factors of a weight's task gradients, from one use of the weight in one micro-batch.

    dy [N, out]: gradient of the layer's output. x [N, in]: its input. segments: the tasks' rows.
    """

    dy: Tensor
    x: Tensor
    segments: Segments


class KeepSink(MergingSink):
    """Sink that keeps Linears' weight gradients as pairs, and all other task gradients themselves.

    There is one pair for each use of a weight in a micro-batch. The other task gradients, [T,
    *shape] of biases, LayerNorms and adapters, are small. Autograd gets no gradient.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        ranks: Ranks | None = None,
        sketch_size: int | None = None,
    ) -> None:
        super().__init__(parameters, num_tasks, sparse=sparse, ranks=ranks, sketch_size=sketch_size)
        self._pairs: dict[int, list[Pair]] = {}
        self._delivered: dict[int, Tensor] = {}
        self._most = 0

    def linear(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        dy: Tensor,
        x: Tensor,
        segments: Segments,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.takes(weight):
            return super().linear(weight, bias, dy, x, segments, needed)
        self.check_active()
        rows = segments.host[-1]
        # Detached: an attached tensor would keep its autograd graph, and all tensors saved there.
        self._pairs.setdefault(id(weight), []).append(Pair(dy.detach()[:rows], x.detach()[:rows], segments.fixed()))
        db = None
        if bias is not None and needed[1]:
            db = self.products(bias, dy, lambda dy, rows: dy[rows].sum(0), segments)
        return None, db

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        gradients, before = cast(gradients, torch.float32), self._delivered.get(id(parameter))
        self._delivered[id(parameter)] = gradients if before is None else before + gradients
        return None

    @torch.no_grad()
    def task_gradient(self, parameter: nn.Parameter, task: int) -> Tensor | None:
        pairs, found = self._pairs.get(id(parameter)), self._delivered.get(id(parameter))
        delivered = None if found is None else found[task]
        if not pairs:
            return delivered
        product = _product(pairs, task)
        return product if delivered is None else delivered + product

    @torch.no_grad()
    def gramian(self) -> Tensor:
        """Return G, float32 [T, T].

        The T task gradients of every weight are computed in one reused buffer: on CPUs, allocating
        new memory takes as long as computing them.
        """
        device = self.anchor.device
        total = torch.zeros(self.num_tasks, self.num_tasks, device=device)
        vectors, buffer = dict[int, Tensor](), torch.empty(0)
        for parameter in self.dense:  # in the same order on every rank, for the collectives
            pairs, found = self._pairs.get(id(parameter)), self._delivered.get(id(parameter))
            if pairs:
                size = self.num_tasks * parameter.numel()
                if buffer.numel() < size or buffer.dtype != pairs[0].dy.dtype:
                    buffer = pairs[0].dy.new_empty(size)
                products = buffer[:size].view(self.num_tasks, *parameter.shape)
                _multiply(pairs, products)
                found = products if found is None else found + products
            elif found is None and self.scatters:
                found = torch.zeros(self.num_tasks, *parameter.shape, device=device)
            if found is None:
                continue
            columns = found.reshape(self.num_tasks, -1)
            if self._sketch is not None:
                self._sketch.add(self._index[id(parameter)], columns)
            elif parameter.dim() < 2:
                vectors[id(parameter)] = columns
            else:
                self._add_part(total, id(parameter), gramian(self._share(columns)))
        inputs = (pair.x for pairs in self._pairs.values() for pair in pairs)
        self._most = buffer.nbytes + sum({t.data_ptr(): t.nbytes for t in (*self.tensors(), *inputs)}.values())
        if self._sketch is not None:
            return self._sketched_gramian(self._sketch)
        if vectors:
            joined = torch.cat(list(vectors.values()), 1)
            share = self._share(joined)
            total += gramian(share)
            if self.layers is not None:
                ends = accumulate((vector.shape[1] for vector in vectors.values()), initial=0)
                spans = [(key, slice(*span)) for key, span in zip(vectors, pairwise(ends), strict=True)]
                self.layers.add_columns(share, self._ranks.spans_of_share(spans, *joined.shape))
        return self._of_all_ranks(total)

    @torch.no_grad()
    def combine(self, weights: Tensor, *, narrow: bool = False) -> Merged:
        """Return the merged gradient sum_t weights[t] g_t of every shared parameter by id.

        narrow: see MergingSink.combine; here it applies to gradients that are not kept as pairs.
        A product of pairs has the dtype of `dy` (float32 for float16). Pairs are dropped as soon as
        their product is computed.
        """
        merged = self._merge_delivered(weights, narrow=narrow)
        by_segments: dict[Segments, Tensor] = {}
        for parameter in self.dense:
            key = id(parameter)
            if key in self._pairs:
                product = _merge(self._pairs.pop(key), weights.float(), by_segments)
                merged[key] = product if key not in merged else merged[key] + product
            elif key not in merged:
                merged[key] = torch.zeros_like(parameter)
        merged.update(self._tables.merged(weights))
        return merged

    def reached(self) -> set[int]:
        return super().reached() | set(self._pairs) | set(self._delivered)

    def clear(self) -> None:
        super().clear()
        self._pairs.clear()
        self._delivered.clear()
        self._most = 0

    def nbytes(self) -> int:
        """Return the bytes that this sink held while `gramian` ran.

        They include the layers' inputs and the buffer of products. An input that several weights
        share counts once.
        """
        return self._most

    def tensors(self) -> list[Tensor]:
        """Return the kept task gradients, and `dy` of the pairs; `x` counts as an activation."""
        gradients = [pair.dy for pairs in self._pairs.values() for pair in pairs]
        return [*super().tensors(), *self._delivered.values(), *gradients]

    def _merge_delivered(self, weights: Tensor, *, narrow: bool) -> Merged:
        """Merge all delivered task gradients by one call and drop them; return results by id."""
        found = Merged()
        if self._delivered:
            by_task = zip(*(gradients.unbind() for gradients in self._delivered.values()), strict=True)
            found.update(zip(self._delivered, combine(list(by_task), weights), strict=True))
        self._delivered.clear()
        for parameter in self.dense if narrow else ():
            if id(parameter) in found:
                found[id(parameter)] = cast(found[id(parameter)], parameter.dtype)
        return found

    def _share(self, gradients: Tensor) -> Tensor:
        """Return this rank's share of n columns [T, n] of J, after their sum over ranks.

        If J is a sum over ranks, they are float32, since the ranks' dtypes may differ.
        """
        return self._ranks.scatter(cast(gradients, torch.float32)) if self.scatters else gradients


def _multiply(pairs: list[Pair], out: Tensor) -> None:
    """Write the T task gradients of a weight into `out` [T, out, in].

    A task's rows of all pairs are concatenated and multiplied once, so the result is rounded once.
    """
    for task, product in enumerate(out):
        _product(pairs, task, product)


def _product(pairs: list[Pair], task: int, out: Tensor | None = None) -> Tensor:
    """Return one task's gradient of a weight [out, in], written into `out` if given."""
    parts = [(pair, pair.segments.rows()[task]) for pair in pairs]
    parts = [(pair, rows) for pair, rows in parts if rows.stop > rows.start] or parts[:1]
    dy = _joined([pair.dy[rows] for pair, rows in parts])
    x = _joined([pair.x[rows] for pair, rows in parts])
    return torch.mm(dy.t(), x, out=out)


def _merge(pairs: list[Pair], weights: Tensor, by_segments: dict[Segments, Tensor]) -> Tensor:
    """Return (weights[task of row] * dy)^T x [out, in].

    by_segments: cache of the weights per row. In float16, the product has weights divided by the
    largest one, and is multiplied by the largest one in float32, so that `weights * dy` cannot
    overflow.
    """
    dtype = pairs[0].dy.dtype
    largest = weights.abs().max().clamp(min=1e-30) if dtype == torch.float16 else None
    rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for dy, x, segments in pairs:
        if segments not in by_segments:
            by_segments[segments] = segments.per_row(weights)[:, None]
        per_row = by_segments[segments]
        weighted, key = dy * (per_row if largest is None else per_row / largest), (x.data_ptr(), len(x))
        if key in rows:  # one input in several passes needs one product
            weighted = rows[key][0] + weighted
        rows[key] = weighted, x
    found = list(rows.values())
    product = _joined([cast(weighted, dtype) for weighted, _ in found]).t() @ _joined([x for _, x in found])
    return product if largest is None else product.float() * largest


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
