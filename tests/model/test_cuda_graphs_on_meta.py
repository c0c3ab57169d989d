"""What the host does in a forward and backward that a GPU would capture, on tensors without data.

The Triton launchers run with kernels that only note how they are started. Reading a tensor on the host is an error
there, and so is a copy from the host; what is started must be the same for every batch of a bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from recorded_encoders import make_encoder, make_sink
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.static_batch import Bucket, rows_of
from fastmtl.model.static_layers import StaticLayers
from fastmtl_kernels.varlen_attention_plan import AttentionPlan

pytest.importorskip("triton")
MakeBatch = Callable[..., PackedBatch]
META = torch.device("meta")
KERNELS = {
    "embed_layer_norm": ["_embed_layer_norm_fwd_kernel"],
    "add_layer_norm": ["_add_layer_norm_fwd_kernel", "_add_layer_norm_bwd_kernel", "_sum_slots_kernel"],
    "varlen_attention": ["tile_fwd_kernel", "tile_bwd_kernel", "long_fwd_kernel", "long_bwd_kernel"],
}


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.device == META
        return value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
    return value


class Started(TorchDispatchMode):
    """What was started, kernels and torch's own operators, with everything that the host gave along."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [described(leaf) for leaf in tree_leaves((args, kwargs or {}))]
        self.all.append((func, given))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Started]]:
    """A place for the mode that is active."""
    active: list[Started] = []

    def noting(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def start(**arguments: Any) -> None:
                    active[-1].all.append((name, grid, {key: described(value) for key, value in arguments.items()}))

                return start

        return Kernel()

    for operation, names in KERNELS.items():
        monkeypatch.setattr(import_module(f"fastmtl_kernels.{operation}"), "select", lambda *_: "triton")
        for name in names:
            monkeypatch.setattr(import_module(f"fastmtl_kernels.{operation}_triton"), name, noting(name))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # knows no such device
    yield active


def test_the_host_starts_the_same_for_every_batch(make_batch: MakeBatch, started: list[Started]) -> None:
    encoder = make_encoder(dtype=torch.bfloat16).to(META)
    sink = make_sink(encoder, 3)
    embeddings, layers = encoder.embeddings, encoder.encoder.layer
    words = embeddings.word_embeddings.weight
    parameters = [p for part in (embeddings, layers) for p in part.parameters() if p is not words]
    batches = [make_batch(lengths) for lengths in ([[150, 2], [70], [30]], [[5], [], [140, 7]])]
    plans = [AttentionPlan.make(b.host.cu_seqlens, rows_of(b.num_tokens)) for b in batches]
    bucket = Bucket.of(batches[0].num_tokens, plans[0])
    assert bucket.rows == rows_of(batches[1].num_tokens)
    bucket = dataclasses.replace(bucket, tiles=4, blocks=8)
    with sink.armed("stack", META):
        static = StaticLayers(layers, embeddings, parameters, bucket, 3, words, sink, None)
        found = []
        # The first forward makes views of seeds and plan that stay; warming up does so before recording.
        for batch, plan in zip([batches[0], *batches], [plans[0], *plans], strict=True):
            ids = [torch.zeros(batch.num_tokens, dtype=torch.int64, device=META) for _ in range(3)]
            static.fill(ids, batch.host, plan, torch.arange(9).to(META))
            started.append(Started())
            with started[-1]:
                static.forward()
                static.backward(stores=True)
                static.backward(stores=False)
            static.release()
            found.append(started[-1].all)
    assert found[1] == found[2]
    names = [entry[0] for entry in found[1] if isinstance(entry[0], str)]
    assert set(names) == {name for kernels in KERNELS.values() for name in kernels}
    # A layer: attention of two kinds of sequences, two LayerNorms; backward twice, its LayerNorm two kernels, as those
    # of the embeddings.
    assert len(names) == 2 * (2 + 2 + 2 * (2 + 4)) + 1 + 2 * 2
