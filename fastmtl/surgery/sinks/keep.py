"""`storage: kept`: the sink that keeps the factors of task gradients in place of their products.

A Linear's task gradients are dW_t = dY[rows of t]^T X[rows of t]. After backward, the T products of
one weight at a time give its part of the Gramian. With the weights c, the merged gradient is one
more product: (c[task of row] * dY)^T X. So X and dY are kept: N (in + out) numbers for N rows, in
place of T x out x in.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """One use of a weight in one micro-batch.

    dy [N, out], x [N, in]. segments: the tasks of the N rows.
    """

    dy: Tensor
    x: Tensor
    segments: Segments


class KeepSink(MergingSink):
    """Weights of Linears as pairs, one per use and micro-batch; other task gradients as they are.

    Biases, norms and the maps of adapters deliver [T, *shape], which is small. Autograd gets no
    gradient.
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
        if not self.wants(weight):
            return super().linear(weight, bias, dy, x, segments, needed)
        self.check_active()
        rows = segments.host[-1]
        # Detached, since their graphs would keep tensors that backward has finished with.
        self._pairs.setdefault(id(weight), []).append(Pair(dy.detach()[:rows], x.detach()[:rows], segments))
        db = None
        if bias is not None and needed[1]:
            db = self.products(bias, dy, lambda dy, rows: dy[rows].sum(0), segments)
        return None, db

    def deliver(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        if not self.wants(parameter):
            return gradients.sum(0)
        self.check_active()
        gradients, before = cast(gradients, torch.float32), self._delivered.get(id(parameter))
        self._delivered[id(parameter)] = gradients if before is None else before + gradients
        return None

    @torch.no_grad()
    def gramian(self) -> Tensor:
        """Return G, float32 [T, T].

        The T products of all weights share one buffer, one weight after the other: on CPUs, fresh
        memory costs as much as the products that fill it.
        """
        device = self.anchor.device
        total = torch.zeros(self.num_tasks, self.num_tasks, device=device)
        vectors, buffer = [], torch.empty(0)
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
            if self._sketch is not None:
                self._sketch.add(self._index[id(parameter)], found.flatten(1))
            elif parameter.dim() < 2:
                vectors.append(found.flatten(1))
            else:
                total += self._share(found.flatten(1))
        inputs = (pair.x for pairs in self._pairs.values() for pair in pairs)
        self._most = buffer.nbytes + sum({t.data_ptr(): t.nbytes for t in (*self.tensors(), *inputs)}.values())
        if self._sketch is not None:
            return self._sketched_gramian(self._sketch)
        if vectors:
            total += self._share(torch.cat(vectors, 1))
        return self._ranks.total(total) + self._tables.gramian(device)

    @torch.no_grad()
    def combine(self, weights: Tensor, *, narrow: bool = False) -> Merged:
        """Return sum_t weights[t] g_t of every shared parameter by id, as in the base class.

        Products have the dtype of the rows, whatever `narrow` is. Each weight's pairs are dropped
        when its product is computed.
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
        """Return the bytes kept when the Gramian was computed.

        They include layer inputs and the buffer of products. An input of several weights counts
        once.
        """
        return self._most

    def tensors(self) -> list[Tensor]:
        """Return the held tensors without the layers' inputs, which are activations kept longer."""
        gradients = [pair.dy for pairs in self._pairs.values() for pair in pairs]
        return [*super().tensors(), *self._delivered.values(), *gradients]

    def _merge_delivered(self, weights: Tensor, *, narrow: bool) -> Merged:
        """Merge the delivered task gradients in one call and drop them."""
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
        """Return G's part from [T, n] columns of this rank, or from its share of them over ranks.

        Over ranks, the computation is in float32, since their dtypes may differ.
        """
        return gramian(self._ranks.scatter(cast(gradients, torch.float32)) if self.scatters else gradients)


def _multiply(pairs: list[Pair], out: Tensor) -> None:
    """Write the T products of a weight into `out` [T, out, in].

    The rows of all pairs form one product, which is rounded once.
    """
    left = [pair.segments.split(pair.dy) for pair in pairs]
    right = [pair.segments.split(pair.x) for pair in pairs]
    for task, product in enumerate(out):
        dy, x = (_joined([rows[task] for rows in side]) for side in (left, right))
        torch.mm(dy.t(), x, out=product)


def _merge(pairs: list[Pair], weights: Tensor, by_segments: dict[Segments, Tensor]) -> Tensor:
    """Return (weights[task of row] * dy)^T x [out, in].

    by_segments: cache of the weights per row. In float16, the weights are divided by the largest
    one before the product, so that neither a loss scale nor their size overflows.
    """
    dtype = pairs[0].dy.dtype
    largest = weights.abs().max().clamp(min=1e-30) if dtype == torch.float16 else None
    rows = []
    for dy, _, segments in pairs:
        if segments not in by_segments:
            by_segments[segments] = segments.per_row(weights)[:, None]
        per_row = by_segments[segments]
        rows.append(cast(dy * (per_row if largest is None else per_row / largest), dtype))
    product = _joined(rows).t() @ _joined([pair.x for pair in pairs])
    return product if largest is None else product.float() * largest


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
