"""Recorded layers without a GPU, by a recorder of operators instead of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_recorder import HostRead, OpRecorder
from recorded_encoders import (
    MICRO_BATCHES,
    assert_close,
    assert_equal,
    graphs_of,
    make_encoder,
    make_sink,
    plain_step,
    step,
)
from torch import Tensor, nn

from fastmtl.cuda_graphs.buffers.batch import Bucket, rows_of
from fastmtl.cuda_graphs.recorder import Unrecorded
from fastmtl.cuda_graphs.writes import RecordedWrites
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl_kernels._native import why_unavailable
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

MakeBatch = Callable[..., PackedBatch]

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable() or "built")


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])
def test_replays_equal_the_eager_layers_bit_for_bit(num_tasks: int, make_batch: MakeBatch) -> None:
    """They equal the unrecorded encoder within rounding, with one or two micro-batches."""
    batches = [make_batch(lengths, seed=k) for k, lengths in enumerate(MICRO_BATCHES[num_tasks])]
    recorder = OpRecorder()
    ways = [make_encoder(recorder), make_encoder(Unrecorded()), make_encoder()]
    sinks = [make_sink(encoder, num_tasks) for encoder in ways]
    for seed, batch in enumerate([*batches, *batches]):
        recorded, eager, plain = (
            step(encoder, sink, [batch, batches[0]][: 1 + seed % 2], seed)
            for encoder, sink in zip(ways, sinks, strict=True)
        )
        assert_equal(recorded, eager)
        assert_close(recorded, plain)
    buckets = {Bucket.of(b.num_tokens, _plan(b)) for b in batches}
    assert len(recorder.recordings) == 3 * len(buckets) >= 6
    assert recorder.replayed > 0


def test_the_embeddings_are_in_unless_one_is_frozen(make_batch: MakeBatch) -> None:
    batch = make_batch(MICRO_BATCHES[3][0])
    for frozen in (False, True):
        encoder, plain = make_encoder(OpRecorder()), make_encoder()
        for one in (encoder, plain):
            one.embeddings.token_type_embeddings.weight.requires_grad_(not frozen)
        ran: list[None] = []
        encoder.embeddings.register_forward_hook(lambda *_, ran=ran: ran.append(None))
        sink, plain_sink = (
            StackSink(
                [p for p in one.parameters() if p.requires_grad], 3, sparse=[one.embeddings.word_embeddings.weight]
            )
            for one in (encoder, plain)
        )
        for seed in range(2):
            ran.clear()
            assert_close(step(encoder, sink, [batch], seed), step(plain, plain_sink, [batch], seed))
        assert len(ran) == frozen  # a replay runs no Python
        assert not graphs_of(encoder).recordings.warned


def _plan(batch: PackedBatch) -> AttentionPlan:
    return AttentionPlan.make(batch.host.cu_seqlens, rows_of(batch.num_tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_leaves_autograd_the_gradients_of_eager_execution(dtype: torch.dtype, make_batch: MakeBatch) -> None:
    recorder = OpRecorder()
    ways = [make_encoder(recorder, dtype=dtype), make_encoder(Unrecorded(), dtype=dtype), make_encoder(dtype=dtype)]
    for seed, lengths in enumerate(MICRO_BATCHES[3]):
        batch = make_batch(lengths, seed=seed)
        recorded, eager, plain = (plain_step(encoder, batch, seed) for encoder in ways)
        assert_equal(recorded, eager)
        if dtype == torch.float32:
            assert_close(recorded, plain)
    assert recorder.recordings


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_bf16_rows_in_either_kind_of_j(kept: torch.dtype, make_batch: MakeBatch) -> None:
    """Grouped products need bf16 on a GPU. They round at other places than the encoder does."""
    ways = [make_encoder(recorder, dtype=torch.bfloat16) for recorder in (OpRecorder(), Unrecorded(), None)]
    sinks = [make_sink(encoder, 3, kept) for encoder in ways]
    wide = make_encoder()
    wide.load_state_dict(ways[0].state_dict())
    wide_sink = make_sink(wide, 3)
    for seed, lengths in enumerate(MICRO_BATCHES[3]):
        batches = [make_batch(lengths, seed=seed)] * 2
        recorded, eager, plain = (step(e, s, batches, seed) for e, s in zip(ways, sinks, strict=True))
        assert_equal(recorded, eager)
        exact = step(wide, wide_sink, batches, seed)
        for one, other, true in zip(recorded, plain, exact, strict=True):
            if one.numel() and one.is_floating_point():
                error = (other.float() - true).norm()
                assert (one.float() - true).norm() <= 1.5 * error


def _differs(make_batch: MakeBatch) -> bool:
    """Return whether a replay on another batch has other bits than the eager layers."""
    encoders = [make_encoder(OpRecorder()), make_encoder(Unrecorded())]
    sinks = [make_sink(encoder, 3) for encoder in encoders]
    found = []
    for encoder, sink in zip(encoders, sinks, strict=True):
        steps = [step(encoder, sink, [make_batch(lengths)], 5) for lengths in MICRO_BATCHES[3][:2]]
        found.append(steps[1])
        assert type(graphs_of(encoder).recordings.recorder) is (OpRecorder if encoder is encoders[0] else Unrecorded)
    return any(not torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_seed_from_the_host_does_not_go_unnoticed(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _differs(make_batch)
    right = ForwardContext.seed

    def baked(context: ForwardContext, at: int) -> Tensor | None:
        seed = right(context, at)
        return None if seed is None else torch.tensor(seed.tolist())

    monkeypatch.setattr(ForwardContext, "seed", baked)
    assert _differs(make_batch)


def test_offsets_from_the_host_do_not_go_unnoticed(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def baked(
        writes: RecordedWrites, weight: nn.Parameter, bias: nn.Parameter | None, dy: Tensor, x: Tensor, *_: Any
    ) -> tuple[None, None]:
        offsets = writes._offsets.tolist()
        rows = [slice(*pair) for pair in zip(offsets, offsets[1:], strict=False)]
        writes.take(weight, torch.stack([dy[part].t() @ x[part] for part in rows]))
        if bias is not None:
            writes.take(bias, torch.stack([dy[part].sum(0) for part in rows]))
        return None, None

    monkeypatch.setattr(RecordedWrites, "linear", baked)
    assert _differs(make_batch)


def test_waiting_for_the_device_cannot_be_recorded() -> None:
    number = torch.ones(1)
    with pytest.raises(HostRead):
        OpRecorder().record(lambda: torch.full((2,), number.item()).add_(1))  # type: ignore[arg-type]


def test_what_is_not_finite_stays_in_its_task(make_batch: MakeBatch) -> None:
    batch = make_batch(MICRO_BATCHES[3][0])
    encoder = make_encoder(OpRecorder())
    sink = make_sink(encoder, 3)
    for _ in range(2):  # stored, then added
        with sink.armed(torch.device("cpu")):
            hidden = encoder(batch, task_grads=sink)
            dy = torch.ones_like(hidden)
            dy[batch.host.token_offsets[1]] = torch.nan
            torch.autograd.grad(hidden, [sink.anchor], dy)
        for parameter in encoder.encoder.parameters():
            gradients = sink.stack_of(parameter).of(parameter)
            assert gradients[[0, 2]].isfinite().all()
            assert gradients[1].isnan().any()


def test_recording_leaves_no_trace(make_batch: MakeBatch) -> None:
    """Recording changes neither J, to which another bucket adds, nor the random state."""
    batches = [make_batch(lengths) for lengths in MICRO_BATCHES[3]]
    encoder = make_encoder(OpRecorder())
    sink = make_sink(encoder, 3)
    first = step(encoder, sink, batches, 7)
    state = torch.get_rng_state()
    assert_equal(step(encoder, sink, batches, 7), first)
    assert torch.equal(torch.get_rng_state(), state)
