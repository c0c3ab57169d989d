"""Tensors that a layer keeps for backward: counted, derived by the memory model, and by hand."""

from __future__ import annotations

import dataclasses

import pytest

from fastmtl.bench import sizes
from fastmtl.bench.activations import kept_bytes
from fastmtl.bench.sizes import Size
from fastmtl.bench.workload import Workload
from fastmtl.config import Recompute
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.profile.load import Load
from fastmtl.profile.post_norm import PostNorm
from fastmtl.profile.pre_norm import PreNorm
from fastmtl.profile.rows import Rows
from fastmtl.profile.shape import Shape

ODD = sizes.Shape("odd", hidden=72, layers=3, heads=3, intermediate=200, rows=5, vocabulary=100, positions=128)
# Families whose layers are BERT's.
LIKE_BERT = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}


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


def derived(work: Workload, model: MultiTaskModel) -> int:
    """Return the bytes of a layer that is not the first, as the memory model derives them."""
    shape = Shape.of(model.recipe, model, [Load.of(work.packed_batch)], "none", 1, on_gpu=False)
    rows = Rows(dataclasses.replace(shape, number_bytes=work.dtype.itemsize), keeps_inputs=True)
    return (PreNorm if shape.pre_norm else PostNorm)(rows).kept


def measured(work: Workload, recompute: Recompute) -> int:
    kept = kept_bytes(work, lambda work: work.recomputing(recompute))
    return round(kept["kept_bytes_per_token_and_layer"] * work.packed_batch.num_tokens)


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.1)])
def test_a_layer_keeps_what_was_derived(precision: str, dropout: float, recompute: Recompute) -> None:
    size = Size(ODD, precision=precision, dropout=dropout)
    work = Workload(size)
    model, tokens = work.recomputing(recompute), work.packed_batch.num_tokens
    found = derived(work, model)
    # In addition to bytes that grow with the tokens: four seeds if something is drawn.
    seeds = 4 * 8 if dropout or recompute == "full" else 0
    assert found == by_hand(ODD, size, recompute) * tokens
    assert measured(work, recompute) == found + seeds
    assert isinstance(model.encoder, PackedBert) and len(model.encoder.encoder.layer) == ODD.layers


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LIKE_BERT))
def test_a_layer_of_each_family_keeps_what_was_derived(family: str, recompute: Recompute) -> None:
    work = Workload(Size(dataclasses.replace(ODD, layers=2), dropout=0.1, family=family))
    assert measured(work, recompute) == derived(work, work.recomputing(recompute)) + 4 * 8


def test_less_than_half_of_transformers() -> None:
    """Per real token, with layers like MiniLM's and texts as long as the demo's."""
    shape = dataclasses.replace(sizes.SHAPES["minilm"], layers=2, rows=8, vocabulary=100)
    work = Workload(Size(shape, dropout=0.1))
    theirs, ours = kept_bytes(work, lambda work: work.padded), kept_bytes(work, lambda work: work.packed)
    assert all(ours[key] <= 0.5 * theirs[key] for key in ours)
