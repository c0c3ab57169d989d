"""Forwards of recorded layers that fall back to eager execution, and events that record again."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from op_recorder import OpRecorder
from recorded_encoders import MICRO_BATCHES, assert_close, assert_equal, graphs_of, make_encoder, make_sink, step
from sinks import Mode, sink_of
from torch import nn
from torch.nn.functional import layer_norm

from fastmtl.config import LoraConfig, parse_recipe
from fastmtl.cuda_graphs import encoder as graphs
from fastmtl.cuda_graphs.install import record_encoder
from fastmtl.cuda_graphs.recorder import Unrecorded
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.engine.build import check_engine
from fastmtl.errors import UserError
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.lora import build_lora
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels._native import why_unavailable

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable() or "built")


def test_a_second_forward_falls_back_until_the_first_is_done(
    make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = OpRecorder()
    encoder = make_encoder(recorder, dropout=0.0)
    batch = make_batch(MICRO_BATCHES[3][0])
    for _ in range(2):
        first = encoder(batch)
        replayed = recorder.replayed
        second = encoder(batch)
        assert recorder.replayed == replayed  # warned once
        assert_close([first.detach()], [second.detach()])
        (first.sum() + second.sum()).backward()
        assert recorder.replayed > replayed
    assert [record.message for record in caplog.records] == [
        "cuda_graphs: this forward falls back to eager execution: the previous forward has not run its backward yet"
    ]
    waiting = encoder(batch)
    del waiting
    gc.collect()
    replayed = recorder.replayed
    hidden = encoder(batch)  # the waiting forward is gone, and so is its backward
    assert recorder.replayed > replayed
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a recorded forward allows one backward"):
        hidden.sum().backward()


def test_what_is_returned_stays_when_the_buffers_are_used_again(make_batch: MakeBatch) -> None:
    encoder = make_encoder(OpRecorder())
    kept = encoder(make_batch(MICRO_BATCHES[3][0]))
    before = kept.detach().clone()
    kept.sum().backward()
    grads = [p.grad for p in encoder.parameters() if p.grad is not None]
    copies = [grad.clone() for grad in grads]
    encoder.zero_grad()
    encoder(make_batch(MICRO_BATCHES[3][1], seed=4)).sum().backward()
    assert torch.equal(kept, before)
    assert_equal(grads, copies)


def test_weights_at_another_address_and_another_sink_are_recorded_anew(make_batch: MakeBatch) -> None:
    recorder = OpRecorder()
    encoder, plain = make_encoder(recorder, dropout=0.0), make_encoder(dropout=0.0)
    sink, plain_sink = make_sink(encoder, 3), make_sink(plain, 3)
    batch = make_batch(MICRO_BATCHES[3][0])
    for _ in range(2):
        assert_close(step(encoder, sink, [batch], 1), step(plain, plain_sink, [batch], 1))
    assert len(recorder.recordings) == 3
    for model in (encoder, plain):
        for parameter in model.parameters():
            parameter.data = 1.5 * parameter.data
    assert_close(step(encoder, sink, [batch], 1), step(plain, plain_sink, [batch], 1))
    assert len(recorder.recordings) == 6
    with torch.no_grad():
        for model in (encoder, plain):
            for parameter in model.parameters():
                parameter.mul_(0.5)
    other = make_sink(encoder, 3)
    assert_close(step(encoder, other, [batch], 1), step(plain, plain_sink, [batch], 1))
    assert len(recorder.recordings) == 9
    for _ in range(6):
        step(encoder, make_sink(encoder, 3), [batch], 1)
    assert graphs_of(encoder).recordings.warned == [
        "this forward falls back to eager execution: the weights' addresses or the sink change too often"
    ]
    other_encoder = copy.deepcopy(encoder)
    assert graphs_of(other_encoder)._encoder is other_encoder


def test_where_enough_is_kept_a_larger_recording_serves(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    recorder = OpRecorder()
    encoder, plain = make_encoder(recorder, dropout=0.0), make_encoder(dropout=0.0)
    sink, plain_sink = make_sink(encoder, 3), make_sink(plain, 3)
    small, large = make_batch(MICRO_BATCHES[3][0]), make_batch(MICRO_BATCHES[3][3])
    for batch, recordings in ((small, 3), (large, 6), (small, 6), (large, 6)):
        assert_close(step(encoder, sink, [batch], 1), step(plain, plain_sink, [batch], 1))
        assert len(recorder.recordings) == recordings


def test_reasons_are_warned_once(make_batch: MakeBatch, caplog: pytest.LogCaptureFixture) -> None:
    batch = make_batch(MICRO_BATCHES[3][0])

    def reason_of(encoder: nn.Module, **options: Any) -> str:
        caplog.clear()
        for _ in range(2):
            encoder(batch, **options)
        (record,) = caplog.records
        return record.message.split(": ", 2)[2]

    encoder = make_encoder(OpRecorder())
    assert reason_of(encoder, noise=torch.zeros(1)) == "it uses noise"
    lora = build_lora(LoraConfig(rank=1), encoder, 3)
    assert reason_of(encoder, lora=lora) == "it uses a LoRA"
    encoder.recompute = "full"
    assert reason_of(encoder) == "it uses recompute"
    sink = make_sink(make_encoder(), 3)
    with sink.armed(torch.device("cpu")):
        reason = reason_of(make_encoder(OpRecorder()), task_grads=sink)
        assert reason == "some weights of the layers are not shared parameters"
    modes: list[Mode] = ["gramian", "tensor", "keep"]
    for mode in modes:
        encoder = make_encoder(OpRecorder())
        other = sink_of(mode, list(encoder.parameters()), 3, sparse=[encoder.embeddings.word_embeddings.weight])
        with other.armed(torch.device("cpu")):
            assert reason_of(encoder, task_grads=other) == "the task gradients are not stored in J"
    with torch.autocast("cpu", torch.bfloat16):
        assert reason_of(make_encoder(OpRecorder())) == "torch_autocast is on"
    encoder = make_encoder(OpRecorder()).requires_grad_(False)
    assert reason_of(encoder) == "the encoder is frozen"
    encoder = make_encoder(OpRecorder())
    encoder.embeddings.requires_grad_(False)
    assert reason_of(encoder) == "the embeddings are frozen"
    encoder = make_encoder(OpRecorder())
    encoder.use_layer_norm(lambda x, weight, bias, shape, eps: layer_norm(x, shape, weight, bias, eps))
    assert reason_of(encoder) == "LayerNorm is not fastmtl's"
    encoder = make_encoder()
    record_encoder(encoder)
    assert reason_of(encoder) == "CUDA graphs need an NVIDIA GPU, the model is on cpu"
    caplog.clear()
    with torch.no_grad():
        encoder(batch)
    encoder.eval()(batch)
    encoder.train()(make_batch([[], [], []]))
    assert not caplog.records


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"encoder": {"recompute": "cheap"}}, "encoder.recompute: cheap"),
        ({"engine": {"zero": 3}}, "engine.zero: 3"),
        ({"smart": {"strength": 1.0}}, "smart"),
        ({"gradient": {"method": "pcgrad", "storage": "kept"}}, "gradient.storage: kept"),
        ({"gradient": {"method": "pcgrad", "storage": "replay"}}, "gradient.storage: replay"),
        ({"gradient": {"method": "pcgrad", "scope": "tensor"}}, "gradient.scope: tensor"),
        ({"gradient": {"method": "pcgrad"}}, "engine.precision: bf16, not fp32"),
    ],
)
def test_what_contradicts_is_refused(sections: dict[str, Any], named: str) -> None:
    sections = {**sections, "engine": {**sections.get("engine", {}), "cuda_graphs": True}}
    recipe = parse_recipe({"tasks": {"one": {"type": "binary", "data": {}}}, **sections}, "test")
    with pytest.raises(UserError, match=f"engine.cuda_graphs: .*{named}"):
        check_engine(recipe, 1)


@pytest.mark.parametrize("method", ["record", "warm_up"])
def test_a_failed_recording_leaves_the_same_operations(
    method: str, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Unrecorded):
        pass

    def fail(*_: object) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the capture has failed before")

    monkeypatch.setattr(Failing, method, fail)

    batch = make_batch(MICRO_BATCHES[3][0])
    found = []
    for recorder in (Failing(), OpRecorder()):
        encoder = make_encoder(recorder)
        found.append([step(encoder, make_sink(encoder, 3), [batch], k) for k in range(2)])
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)
    assert [record.message for record in caplog.records] == [
        "cuda_graphs: recording failed, each operation is launched separately: operation not permitted when "
        "stream is capturing"
    ]


def test_the_sink_is_notified_of_every_weight(make_batch: MakeBatch) -> None:
    """Forward expects each weight once and backward completes it once, as in eager execution."""

    class Early:
        begun = False

        def __init__(self) -> None:
            self.expected: list[int] = []
            self.complete_ones: list[int] = []

        def begin(self, expected: dict[int, int]) -> None:
            self.expected, self.begun = [*expected], True
            assert set(expected.values()) == {1}

        def is_sent(self, key: int) -> bool:
            return False

        def complete(self, key: int) -> None:
            self.complete_ones.append(key)

    found = []
    for recorder in (OpRecorder(), None):
        encoder = make_encoder(recorder)
        sink, early = make_sink(encoder, 3), Early()
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        sink.early = early  # type: ignore[assignment]
        with sink.armed(torch.device("cpu")):
            hidden = encoder(make_batch(MICRO_BATCHES[3][0]), task_grads=sink)
            sink.forward_done(last=True)
            torch.autograd.grad(hidden.sum(), [sink.anchor])
        found.append((sorted(names[key] for key in early.expected), [names[key] for key in early.complete_ones]))
    assert found[0] == found[1]


def _losses(this: MultiTaskModel, batch: PackedBatch, task_grads: Sink) -> Losses:
    return this(batch, task_grads)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_and_merged_gradients_of_a_model(
    accumulation: int, make_batch: MakeBatch, make_model: MakeModel
) -> None:
    pairs = [False, False, True]
    lengths = [[[5, 9], [4], [7, 8]], [[12], [], [3, 3, 2, 9]], [[30] * 8, [2], [6, 5]]]
    micro_batches = [make_batch(one, pairs=pairs, seed=k) for k, one in enumerate(lengths)]
    ways = []
    for recorder in (OpRecorder(), None):
        model = make_model().train()
        if recorder is not None:
            assert isinstance(model.encoder, PackedBert)
            record_encoder(model.encoder, recorder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        surgery = GradientSurgery(
            optimizer,
            "pcgrad",
            tasks=model.recipe.task_names,
            shared=model.shared_parameters(),
            sparse=model.sparse_parameters(),
        )
        ways.append((model, optimizer, surgery))
    for k in range(3):
        batches = (micro_batches * 2)[k : k + accumulation]
        rows = [sum(one) for one in zip(*[batch.counts for batch in batches], strict=True)]
        counts = dict(zip(ways[0][0].recipe.task_names, rows, strict=True))
        found = []
        for model, optimizer, surgery in ways:
            torch.manual_seed(k)
            info = surgery.run(batches, partial(_losses, model), counts)
            found.append([*map(torch.tensor, info.losses.values()), *(p.grad.clone() for p in model.parameters())])
            optimizer.zero_grad()
        assert_close(*found)
    encoder = ways[0][0].encoder
    assert isinstance(encoder, PackedBert) and graphs_of(encoder)._kept
