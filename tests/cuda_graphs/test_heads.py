"""Recorded heads and losses without a GPU, by a recorder of operators instead of CUDA graphs."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from op_recorder import OpRecorder
from recorded_encoders import assert_equal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unit_rows import unit_rows

from fastmtl.cuda_graphs import heads as head_graphs
from fastmtl.cuda_graphs import options as graph_options
from fastmtl.cuda_graphs.buffers.heads import StaticHeads
from fastmtl.cuda_graphs.encoder import EncoderGraphs
from fastmtl.cuda_graphs.heads import HeadGraphs
from fastmtl.cuda_graphs.install import record_heads
from fastmtl.cuda_graphs.recorder import CudaRecorder, Recorder, Unrecorded
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.engine.build import build_engine
from fastmtl.errors import UserError
from fastmtl.model.examples import HeadBatch
from fastmtl.model.losses.cached_pairs import cache_pairs
from fastmtl.model.multitask import MultiTaskModel

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]

CLASSES = {"type": "classification", "num_labels": 5, "data": {}}
BINARY = {"type": "binary", "data": {}, "pooling": "mean"}
SCORE = {"type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean", "data": {}}
# Together they have heads of every kind and all losses; labels and pairs are those of make_batch.
TASKS = {
    "projected": {
        "classes": {**CLASSES, "head": {"projection": 8, "projection_dropout": 0.2, "adjustment": True}},
        "binary": {**BINARY, "head": {"name": "mlp", "hidden": [8]}},
        "score": SCORE,
    },
    "cosines": {
        "classes": {**CLASSES, "loss": "mse", "pooling": "max"},
        "binary": {
            **BINARY,
            "pairs": "bi",
            "head": {"name": "linear_cosine"},
            "loss": {"bce": 1, "cosine_embedding": 2},
        },
        "score": {**SCORE, "head": {"name": "cosine", "squash": "relu"}},
    },
    "networks": {
        "classes": {**CLASSES, "head": {"name": "lstm", "size": 6, "cls": True, "hidden": [4]}},
        "binary": {**BINARY, "pairs": "bi", "head": {"name": "mlp"}, "loss": ["bce", "mnr"]},
        "score": {**SCORE, "loss": "cross_entropy", "bins": 4, "head": {"name": "mlp", "features": ["v", "product"]}},
    },
    "weighted": {
        "classes": {
            **CLASSES,
            "loss": ["cross_entropy", "focal"],
            "class_weights": [1.0, 2.0, 0.5, 4.0, 1.0],
            "label_smoothing": 0.1,
        },
        "binary": {**BINARY, "loss": "focal", "class_weights": [1.0, 3.0]},
        "score": SCORE,
    },
}
PAIRS = {
    "projected": [False, False, True],
    "weighted": [False, False, True],
    "cosines": [False, True, True],
    "networks": [False, True, True],
}
# Two batches with equal numbers of sequences; then a task without examples; then one task alone.
LENGTHS = [[[5, 1, 9], [4, 2], [7, 8]], [[2, 30, 3], [9, 1], [12, 3]], [[8], [], [3, 3, 2, 9]], [[], [6, 5], []]]


def made(make_model: MakeModel, recorder: Recorder | None, **sections: Any) -> MultiTaskModel:
    model = make_model(**sections).train()
    if recorder is not None:
        record_heads(model, recorder)
    return model


def step(model: MultiTaskModel, batches: Sequence[PackedBatch], seed: int) -> list[Tensor]:
    """Return the losses of each micro-batch, all gradients and the final random state."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = []
    for batch in batches:
        losses = [loss for loss, _ in model(batch).values()]
        torch.stack([loss * (k + 1) for k, loss in enumerate(losses)]).sum().backward()
        found += [loss.detach() for loss in losses]
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in grads)
    return [*found, *(grad.clone() for grad in grads if grad is not None), torch.get_rng_state()]


def graphs_of(model: MultiTaskModel) -> HeadGraphs:
    assert isinstance(model.recorded_heads, HeadGraphs)
    return model.recorded_heads


def warned(model: MultiTaskModel) -> list[str]:
    return graphs_of(model).recordings.warned


@pytest.mark.parametrize(
    ("tasks", "weighting"),
    [("projected", "uncertainty"), ("cosines", "fixed"), ("networks", "fixed"), ("weighted", "fixed")],
)
def test_replays_have_the_bits_of_eager_execution(
    tasks: str, weighting: str, make_batch: MakeBatch, make_model: MakeModel
) -> None:
    """Replay with dropout, on batches of equal and of other sizes, one or two in a step."""
    recorder = OpRecorder()
    sections = {"tasks": TASKS[tasks], "weighting": {"name": weighting}}
    ways = [made(make_model, one, **sections) for one in (recorder, Unrecorded(), None)]
    batches = [make_batch(lengths, pairs=PAIRS[tasks], seed=k) for k, lengths in enumerate(LENGTHS)]
    for seed, first in enumerate([0, 1, 2, 3, 3, 0, 0]):
        for model in ways:
            model.heads.train(seed < 6)
        step_batches = [batches[first], batches[(first + 1) % 4]][: 1 + seed % 2]
        recorded, eager, plain = (step(model, step_batches, seed) for model in ways)
        assert_equal(recorded, eager)
        assert_equal(recorded, plain)
    assert len(recorder.recordings) == 2 * 3  # for three different sizes
    assert warned(ways[0]) == []


def test_other_weights_of_the_losses_and_other_labels(make_batch: MakeBatch, make_model: MakeModel) -> None:
    """A replay reads the losses' gradients and the labels from the buffers."""
    ways = [made(make_model, one, tasks=TASKS["projected"]) for one in (OpRecorder(), None)]
    batch = make_batch(LENGTHS[0], pairs=PAIRS["projected"])
    for seed in range(4):
        labels = tuple(None if one is None else one.roll(seed) for one in batch.labels)
        pairs = tuple(None if one is None else one.flip(1) if seed % 2 else one for one in batch.pairs)
        other = dataclasses.replace(batch, labels=labels, pairs=pairs)
        found = []
        for model in ways:
            model.zero_grad()
            torch.manual_seed(seed)
            losses = [loss for loss, _ in model(other).values()]
            (losses[0] + seed * losses[1] + losses[2] * losses[0].detach()).backward()
            found.append([*(p.grad for p in model.parameters() if p.grad is not None)])
        for one, expected in zip(*found, strict=True):
            torch.testing.assert_close(one, expected)


def test_sets_of_labels(make_batch: MakeBatch, make_model: MakeModel) -> None:
    """Labels [E, C] of type multilabel have a place in the buffers, beside labels [E]."""
    sets = {"type": "multilabel", "label_names": ["a", "b", "c"], "data": {}}
    recorder = OpRecorder()
    ways = [made(make_model, one, tasks={"sets": sets, "binary": BINARY}) for one in (recorder, None)]
    for seed in range(3):
        batch = make_batch([[5, 1, 9], [4, 2]], seed=seed)
        drawn = torch.randint(0, 2, (3, 3), generator=torch.Generator().manual_seed(seed)).float()
        batch = dataclasses.replace(batch, labels=(drawn, batch.labels[1]))
        assert_equal(*(step(model, [batch], seed) for model in ways))
    assert len(recorder.recordings) == 2


def _differs(make_batch: MakeBatch, make_model: MakeModel) -> bool:
    """Return whether a replay has other bits than the heads run eagerly."""
    found = []
    for recorder in (OpRecorder(), Unrecorded()):
        model = made(make_model, recorder, tasks=TASKS["projected"])
        found.append([step(model, [make_batch(LENGTHS[0], pairs=PAIRS["projected"], seed=k)], k) for k in range(3)][2])
        assert type(graphs_of(model).recordings.recorder) is type(recorder)
    return any(not torch.equal(*pair) for pair in zip(*found, strict=True))


def test_labels_from_the_host_do_not_go_unnoticed(
    make_batch: MakeBatch, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _differs(make_batch, make_model)
    right = MultiTaskModel._loss

    def baked(model: MultiTaskModel, index: int, found: Any, batch: HeadBatch) -> Tensor:
        labels = tuple(one if one is None else torch.tensor(one.tolist(), dtype=one.dtype) for one in batch.labels)
        return right(model, index, found, dataclasses.replace(batch, labels=labels))

    monkeypatch.setattr(MultiTaskModel, "_loss", baked)
    assert _differs(make_batch, make_model)


class OnMeta(TorchDispatchMode):
    """Mode that raises for a tensor of the host; reading a tensor without data raises by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        assert all(one.device.type == "meta" for one in given), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tasks", list(TASKS))
def test_the_host_reads_and_copies_nothing(
    tasks: str, make_batch: MakeBatch, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # does not know the device meta
    model = make_model(tasks=TASKS[tasks], weighting={"name": "uncertainty"}).train()
    batch = make_batch(LENGTHS[2], pairs=PAIRS[tasks])
    vectors = {name: x.detach().to("meta").requires_grad_() for name, x in model._vectors(batch, None).items()}
    heads = model.to("meta").heads
    read = HeadBatch.of(batch.map(lambda x: x.to("meta")))
    static = StaticHeads(model.losses_of, list(heads.parameters()), vectors, read)
    static.fill(vectors, read)
    with OnMeta():
        static.forward()
        static.backward()


def test_recording_leaves_no_trace_and_what_is_returned_stays(make_batch: MakeBatch, make_model: MakeModel) -> None:
    model = made(make_model, OpRecorder(), tasks=TASKS["projected"])
    batches = [make_batch(LENGTHS[k], pairs=PAIRS["projected"], seed=k) for k in range(2)]
    ordinary, recording, replayed = (step(model, batches[:1], 7) for _ in range(3))
    assert_equal(ordinary, recording)
    assert_equal(ordinary, replayed)
    losses = model(batches[0])
    before = [loss.detach().clone() for loss, _ in losses.values()]
    model.zero_grad()
    torch.stack([loss for loss, _ in losses.values()]).sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    copies = [grad.clone() for grad in grads]
    step(model, batches[1:], 8)
    assert_equal([loss.detach() for loss, _ in losses.values()], before)
    model.zero_grad(set_to_none=True)
    step(model, batches[1:], 9)
    assert_equal(grads, copies)


def test_one_backward_for_one_forward_and_one_forward_at_a_time(make_batch: MakeBatch, make_model: MakeModel) -> None:
    recorder = OpRecorder()
    model, plain = (made(make_model, one, tasks=TASKS["projected"]) for one in (recorder, None))
    batch = make_batch(LENGTHS[0], pairs=PAIRS["projected"])
    step(model, [batch], 0)
    found = []
    for one in (model, plain):
        one.zero_grad()
        torch.manual_seed(1)
        losses = [loss for _ in range(2) for loss, _ in one(batch).values()]
        torch.stack(losses).sum().backward()
        found.append([*losses, *(p.grad for p in one.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert warned(model) == [
        "heads and losses fall back to eager execution: the previous forward has not run its backward yet"
    ]
    replayed = recorder.replayed
    waiting = model(batch)
    del waiting
    gc.collect()
    losses = model(batch)  # the waiting forward is gone, and so is its backward
    assert recorder.replayed > replayed
    losses["score"][0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a recorded forward allows one backward"):
        losses["score"][0].backward()


def test_weights_at_another_address_are_recorded_anew(make_batch: MakeBatch, make_model: MakeModel) -> None:
    recorder = OpRecorder()
    ways = [made(make_model, one, tasks=TASKS["projected"]) for one in (recorder, None)]
    batch = make_batch(LENGTHS[0], pairs=PAIRS["projected"])

    def check(recordings: int) -> None:
        assert_equal(*(step(model, [batch], 3) for model in ways))
        assert len(recorder.recordings) == recordings

    for recordings in (0, 2, 2):
        check(recordings)
    for model in ways:
        for parameter in model.heads.parameters():
            parameter.data = 1.5 * parameter.data
    check(2)
    check(4)
    ways[0].heads[0].requires_grad_(False)
    for _ in range(2):
        ways[0](batch)["score"][0].backward()
    assert len(recorder.recordings) == 6
    for k in range(6):
        ways[0].heads[0].requires_grad_(k % 2 == 0)
        ways[0](batch)
    assert warned(ways[0]) == ["heads and losses fall back to eager execution: the weights' addresses change too often"]
    other = copy.deepcopy(ways[0])
    assert graphs_of(other)._losses == other.losses_of and graphs_of(other)._heads is other.heads


def test_sizes_that_do_not_come_again_are_not_recorded(
    make_batch: MakeBatch, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_graphs, "MOST", 1)
    monkeypatch.setattr(head_graphs, "IDLE", 4)
    monkeypatch.setattr(head_graphs, "_WINDOW", 8)
    recorder = OpRecorder()
    model = made(make_model, recorder)
    first, second, third = (make_batch([[5] * count, [3], [4, 4]], pairs=[False, False, True]) for count in (1, 2, 3))

    def run(*batches: PackedBatch) -> tuple[int, bool]:
        replayed = recorder.replayed
        for batch in batches:
            torch.stack([loss for loss, _ in model(batch).values()]).sum().backward()
        return len(recorder.recordings), recorder.replayed > replayed

    assert run(first) == (0, False)
    assert run(first, first) == (2, True)
    assert run(second, second, first) == (2, True)  # the kept recording is in use
    assert warned(model) == []
    assert run(second, third) == (2, False)
    assert run(third, second) == (2, False)
    (message,) = warned(model)
    assert "differ too much" in message
    assert run(second) == (4, True)  # it is idle now
    assert run(first) == (4, False)


def test_reasons_are_warned_once(
    make_batch: MakeBatch, make_model: MakeModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(LENGTHS[0], pairs=PAIRS["cosines"])

    def reason(model: MultiTaskModel, batch: PackedBatch = batch) -> str:
        caplog.clear()
        for _ in range(2):
            model(batch)
        (record,) = caplog.records
        return record.message.removeprefix("cuda_graphs: heads and losses fall back to eager execution: ")

    tasks = TASKS["cosines"]
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(made(make_model, OpRecorder(), tasks=tasks)) == "torch_autocast is on"
    frozen = made(make_model, OpRecorder(), tasks=tasks).requires_grad_(False)
    assert reason(frozen) == "they depend on no trained parameter"
    wide = made(make_model, OpRecorder(), tasks={"score": {**SCORE, "head": {"adjustment": False}}})
    wide.heads.to(torch.float64)
    with pytest.raises(RuntimeError):
        wide(make_batch([[3, 4]], pairs=[True]))
    assert warned(wide)[0].endswith("their weights and the hidden states differ in dtype")
    model = make_model(tasks=tasks).train()
    record_heads(model)
    assert reason(model) == "CUDA graphs need an NVIDIA GPU, the model is on cpu"
    cached = made(
        make_model, OpRecorder(), tasks={**tasks, "score": {**SCORE, "loss": ["mse", "mnr"], "mnr": {"cached": True}}}
    )
    given = cache_pairs(cached, [batch])[0]
    assert reason(cached, given) == "the loss of task 'score' spans a whole step (mnr.cached)"
    random = np.random.default_rng(0)
    words, one = (
        pack([(unit_rows(kind, 3, random, vocabulary=90, longest=9), np.arange(3)) for kind in kinds])
        for kinds in (("choice", "tokens"), ("tokens",))
    )
    tags = {"type": "tokens", "label_names": list("OABC"), "data": {}}
    mixed = made(make_model, OpRecorder(), tasks={"which": {"type": "choice", "data": {}}, "tags": tags})
    assert reason(mixed, words) == "task 'which' of type choice has another number of units in every batch"
    alone = made(make_model, OpRecorder(), tasks={"tags": tags})
    assert reason(alone, one) == "task 'tags' of type tokens has another number of units in every batch"
    pairs = make_batch(LENGTHS[0], pairs=PAIRS["networks"])
    monkeypatch.setattr(graph_options, "world_size", lambda: 2)
    ranks = made(make_model, OpRecorder(), tasks=TASKS["networks"])
    assert reason(ranks, pairs) == "the loss mnr of task 'binary' spans the pairs of all ranks"
    caplog.clear()
    model = made(make_model, OpRecorder(), tasks=tasks)
    model.predict(batch)
    with torch.no_grad():
        model(batch)
    assert not caplog.records and not graphs_of(model)._of


def test_a_head_that_waits_for_the_device_is_launched_by_the_host(
    make_batch: MakeBatch, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = MultiTaskModel._loss

    def waiting(model: MultiTaskModel, index: int, found: Any, batch: HeadBatch) -> Tensor:
        loss = right(model, index, found, batch)
        return loss * (1.0 if loss.isfinite().item() else 0.0)

    monkeypatch.setattr(MultiTaskModel, "_loss", waiting)
    ways = [made(make_model, one, tasks=TASKS["projected"]) for one in (OpRecorder(), None)]
    batches = [make_batch(LENGTHS[k], pairs=PAIRS["projected"], seed=k) for k in range(2)]
    for seed in range(3):
        assert_equal(*(step(model, batches, seed) for model in ways))
    assert warned(ways[0]) == ["recording failed, each operation is launched separately: aten::_local_scalar_dense"]


def test_errors_are_those_of_eager_execution(make_batch: MakeBatch, make_model: MakeModel) -> None:
    model = made(make_model, OpRecorder(), tasks=TASKS["projected"])
    right = make_batch(LENGTHS[0], pairs=PAIRS["projected"])
    for batch, error in (
        (dataclasses.replace(right, labels=(None, None, None)), ValueError),
        (make_batch(LENGTHS[0]), UserError),
    ):
        messages = []
        for _ in range(3):
            with pytest.raises(error) as caught:
                model(batch)
            messages.append(str(caught.value))
        assert len(set(messages)) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_the_option_reaches_encoder_and_heads(
    asked: bool, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "initialize", lambda **_: [None])
    engine = {"precision": "bf16", "cuda_graphs": asked}
    model = make_model(gradient={"method": "pcgrad"}, engine=engine)
    build_engine(model.recipe, model, 1, 1)
    assert isinstance(model.encoder.recorded, EncoderGraphs) == asked
    assert isinstance(model.recorded_heads, HeadGraphs) == asked


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tasks", ["projected", "cosines", "networks"])
def test_graphs_equal_what_the_host_launches(tasks: str, make_batch: MakeBatch, make_model: MakeModel) -> None:
    """Compare losses, heads' gradients and the generator's state, with dropout, in bf16."""
    ways = [make_model(tasks=TASKS[tasks]).train().to("cuda", torch.bfloat16) for _ in range(2)]
    for model, recorder in zip(ways, (None, Unrecorded()), strict=True):
        record_heads(model, recorder)
    batches = [make_batch(lengths, pairs=PAIRS[tasks], seed=k).to("cuda") for k, lengths in enumerate(LENGTHS)]
    for seed, index in enumerate([0, 1, 2, 3, 3, 2, 0]):
        found = []
        for model in ways:
            losses = step(model, [batches[index]], seed)[:3]
            grads = [parameter.grad for parameter in model.heads.parameters() if parameter.grad is not None]
            found.append([*losses, *grads, torch.cuda.get_rng_state()])
        assert_equal(*found)
    assert warned(ways[0]) == []
    assert isinstance(graphs_of(ways[0]).recordings.recorder, CudaRecorder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capture_that_fails_leaves_the_host_launching_the_same(
    make_batch: MakeBatch, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call `.item()` between two heads: dropout still draws, and later captures succeed."""
    right = MultiTaskModel._loss

    def waiting(model: MultiTaskModel, index: int, found: Any, batch: HeadBatch) -> Tensor:
        loss = right(model, index, found, batch)
        return loss * (1.0 if loss.isfinite().item() else 0.0)

    batches = [make_batch(LENGTHS[0], pairs=PAIRS["projected"], seed=k).to("cuda") for k in range(3)]

    def check(*recorders: Recorder | None) -> MultiTaskModel:
        ways = [make_model(tasks=TASKS["projected"]).train().to("cuda", torch.bfloat16) for _ in recorders]
        for model, recorder in zip(ways, recorders, strict=True):
            record_heads(model, recorder)
        for seed, batch in enumerate(batches):
            found = []
            for model in ways:
                losses = step(model, [batch], seed)[:3]
                grads = [parameter.grad for parameter in model.heads.parameters() if parameter.grad is not None]
                found.append([*losses, *grads, torch.cuda.get_rng_state(), torch.rand(8, device="cuda")])
            assert_equal(*found)
        return ways[0]

    stream = torch.cuda.current_stream()
    with monkeypatch.context() as patch:
        patch.setattr(MultiTaskModel, "_loss", waiting)
        failed = check(None, Unrecorded())
    (message,) = warned(failed)
    assert message.startswith("recording failed, each operation is launched separately: ") and "captur" in message
    assert torch.cuda.current_stream() == stream
    recorded = check(None, Unrecorded())
    assert warned(recorded) == []
    assert isinstance(graphs_of(recorded).recordings.recorder, CudaRecorder)
