"""Work of the host in a forward and backward that a GPU would capture, on tensors without data.

The Triton launchers run with kernels that only record their arguments. Reading a tensor on the host
is an error, and so is a copy from the host. The launches must be equal for all batches of a bucket.
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

from fastmtl.cuda_graphs.buffers.batch import Bucket, rows_of
from fastmtl.cuda_graphs.buffers.layers import StaticLayers
from fastmtl.data.packed_batch import PackedBatch
from fastmtl_kernels.add_layer_norm.api import add_layer_norm
from fastmtl_kernels.embed_layer_norm.api import embed_layer_norm
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

pytest.importorskip("triton")
MakeBatch = Callable[..., PackedBatch]
META = torch.device("meta")
KERNELS = {
    "embed_layer_norm.triton": ["_embed_layer_norm_fwd_kernel"],
    "add_layer_norm.triton": ["_add_layer_norm_fwd_kernel"],
    "layer_norm.triton": ["_add_layer_norm_bwd_kernel", "_sum_slots_kernel"],
    "varlen_attention.triton.launch": ["tile_fwd_kernel", "tile_bwd_kernel", "long_fwd_kernel", "long_bwd_kernel"],
}


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.device == META
        return value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
    return value


class Started(TorchDispatchMode):
    """Launches of kernels and of torch's operators, with all arguments that the host passed."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [described(leaf) for leaf in tree_leaves((args, kwargs or {}))]
        self.all.append((func, given))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Started]]:
    """Replace the kernels; the last entry of the list is the active mode."""
    active: list[Started] = []

    def noting(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def start(**arguments: Any) -> None:
                    active[-1].all.append((name, grid, {key: described(value) for key, value in arguments.items()}))

                return start

        return Kernel()

    for operation in ("embed_layer_norm", "add_layer_norm", "varlen_attention"):
        monkeypatch.setattr(import_module(f"fastmtl_kernels.{operation}.api"), "select", lambda *_, **__: "triton")
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(import_module(f"fastmtl_kernels.{module}"), name, noting(name))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # does not know the device meta
    yield active


def test_the_host_starts_the_same_for_every_batch(make_batch: MakeBatch, started: list[Started]) -> None:
    encoder = make_encoder(dtype=torch.bfloat16).to(META)
    sink = make_sink(encoder, 3)
    parameters = [p for p in encoder.parameters() if p is not encoder.words]
    batches = [make_batch(lengths) for lengths in ([[150, 2], [70], [30]], [[5], [], [140, 7]])]
    plans = [AttentionPlan.make(b.host.cu_seqlens, rows_of(b.num_tokens)) for b in batches]
    bucket = Bucket.of(batches[0].num_tokens, plans[0])
    assert bucket.rows == rows_of(batches[1].num_tokens)
    bucket = dataclasses.replace(bucket, tiles=4, blocks=8)
    with sink.armed(META):
        static = StaticLayers(encoder, True, parameters, bucket, 3, sink, None)
        found = []
        # The first forward makes views of seeds and plan, which a warm-up makes before recording.
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
    # In each layer attention has a kernel for short and one for long sequences, and there are two
    # LayerNorms. Backward runs twice; the backward of a LayerNorm is two kernels, also in the
    # embeddings.
    assert len(names) == 2 * (2 + 2 + 2 * (2 + 4)) + 1 + 2 * 2


def test_without_a_sink_the_kernels_add_up_the_tasks(started: list[Started]) -> None:
    """No operator sums or casts the gradient of a LayerNorm's parameter, as in joint training."""
    rows = torch.zeros(30, 64, dtype=torch.bfloat16, device=META, requires_grad=True)
    columns = [torch.zeros(64, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in range(4)]
    table = torch.zeros(9, 64, dtype=torch.bfloat16, device=META)
    ids, seed = torch.zeros(30, dtype=torch.int64, device=META), torch.zeros(1, dtype=torch.int64, device=META)
    shared: dict[str, Any] = dict(
        dropout_p=0.1, seed=seed, token_offsets=torch.zeros(4, dtype=torch.int32, device=META)
    )
    started.append(Started())
    with started[-1]:
        y = add_layer_norm(rows, rows, *columns[:2], **shared)
        y = y + embed_layer_norm(ids, ids, ids, table, table, table, *columns[2:], **shared)
        y.backward(torch.zeros_like(y))
    assert all(column.grad is not None and column.grad.dtype == torch.bfloat16 for column in columns)
    operators = {what for what, *_ in started[-1].all if not isinstance(what, str)}
    assert not operators & {torch.ops.aten.sum.dim_IntList, torch.ops.aten._to_copy.default}
    assert [what for what, *_ in started[-1].all].count("_sum_slots_kernel") == 2
