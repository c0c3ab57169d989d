"""Tensors that a layer keeps for backward: counted, derived by the memory model, and by hand."""

from __future__ import annotations

import dataclasses

import pytest

from fastmtl.bench import sizes
from fastmtl.bench.activations import kept_bytes
from fastmtl.bench.sizes import Size
from fastmtl.bench.workload import Workload
from fastmtl.config import Recompute
from fastmtl.profile.rows import Rows
from fastmtl.profile.shape import Load, Shape

ODD = sizes.Shape("odd", hidden=72, layers=3, heads=3, intermediate=200, rows=5, vocabulary=100, positions=128)


def by_hand(shape: sizes.Shape, size: Size, recompute: Recompute) -> int:
    """Return bytes per token, as in docs/profiling.md."""
    d, f, number = shape.hidden, shape.intermediate, 4 if size.precision == "fp32" else 2
    bits = 2 * 8 * -(-d // 64) if size.dropout else 0
    statistics = 8 * shape.heads + 2 * 8
    return {
        "none": number * (8 * d + 2 * f) + statistics + bits,
        "cheap": number * (6 * d + f) + statistics + bits,
        "full": number * d,
    }[recompute]


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.1)])
def test_a_layer_keeps_what_was_derived(precision: str, dropout: float, recompute: Recompute) -> None:
    size = Size(ODD, precision=precision, dropout=dropout)
    work = Workload(size)
    model, tokens = work.recomputing(recompute), work.packed_batch.num_tokens
    shape = Shape.of(model.recipe, model, [Load.of(work.packed_batch)], "none", 1, on_gpu=False)
    derived = Rows(dataclasses.replace(shape, number_bytes=work.dtype.itemsize), keeps_inputs=True).kept
    measured = kept_bytes(work, model)["kept_bytes_per_token_and_layer"]
    # In addition to bytes that grow with the tokens: four seeds if something is drawn.
    seeds = 4 * 8 if dropout or recompute == "full" else 0
    assert derived == by_hand(ODD, size, recompute) * tokens
    assert round(measured * tokens) == derived + seeds
    assert len(model.encoder.encoder.layer) == ODD.layers


def test_less_than_half_of_transformers() -> None:
    """Per real token, with layers like MiniLM's and texts as long as the demo's."""
    shape = dataclasses.replace(sizes.SHAPES["minilm"], layers=2, rows=8, vocabulary=100)
    work = Workload(Size(shape, dropout=0.1))
    theirs, ours = (kept_bytes(work, model) for model in (work.padded, work.packed))
    assert all(ours[key] <= 0.5 * theirs[key] for key in ours)
