"""Heads that score units: their batches, losses, gradients per task and scores over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.inference.evaluation import score
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.types.segments import segment_log_softmax
from fastmtl.surgery.sinks.stack import StackSink

MakeModel = Callable[..., MultiTaskModel]
TASKS = {
    "tags": {"type": "tokens", "label_names": ["O", "A", "B"], "data": {}},
    "para": {"type": "binary", "data": {}},
    "which": {"type": "choice", "data": {}},
    "order": {"type": "choice", "data": {}},
}


def dataset(counts: list[int], *, kind: str) -> TokenizedDataset:
    """Make examples of random tokens. counts: the units of each example."""
    random = np.random.default_rng(len(counts))
    n, offsets = len(counts), np.concatenate([[0], np.cumsum(counts)])
    sequences = offsets[-1] if kind == "choice" else n
    lengths = random.integers(3, 9, sequences) if kind != "tokens" else np.array(counts) + 2
    units: UnitTable | None = None
    labels: np.ndarray = random.integers(0, 2, n).astype(np.float32)
    if kind == "tokens":
        places = np.concatenate([1 + np.arange(count) for count in counts]).astype(np.int32)
        units, labels = UnitTable(offsets, places, labelled=True), random.integers(0, 3, offsets[-1])
        labels[1] = -100
    if kind == "choice":
        units, labels = UnitTable(offsets, None), random.integers(0, counts)
    terms = None if kind != "tokens" else np.add.reduceat(labels >= 0, offsets[:-1]).astype(np.int64)
    return TokenizedDataset(
        tokens=random.integers(5, 90, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=lengths.astype(np.int32),
        sequences_per_example=1,
        labels=labels,
        ids=[str(row) for row in range(n)],
        truncated=0,
        skipped=[],
        path=Path("made"),
        example_offsets=offsets if kind == "choice" else None,
        units=units,
        loss_terms=terms,
    )


def datasets() -> list[TokenizedDataset]:
    return [
        dataset([4, 2, 6, 1, 3], kind="tokens"),
        dataset([1] * 4, kind="rows"),
        dataset([2, 5, 3], kind="choice"),
        dataset([3, 3], kind="choice"),
    ]


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> MultiTaskModel:
    from packed_batches import build_model

    return build_model(tiny_bert, tasks=TASKS).eval().double()


def test_losses_are_those_of_each_example_alone(model: MultiTaskModel) -> None:
    data = datasets()
    chosen = [np.array([2, 0, 3]), np.array([1]), np.array([2, 1]), np.array([0])]
    batch = pack(list(zip(data, chosen, strict=True)))
    losses = model(batch)
    assert [losses[name][1] for name in TASKS] == [10, 1, 2, 1] == list(batch.loss_terms)  # one word has no label
    for index, (name, rows) in enumerate(zip(TASKS, chosen, strict=True)):
        parts = [(found, rows[:0]) for found in data]
        alone = []
        for row in rows:
            parts[index] = (data[index], np.array([row]))
            alone.append(model(pack(parts))[name][0])
        torch.testing.assert_close(losses[name][0], torch.stack(alone).sum(), rtol=1e-6, atol=1e-7)
        part = batch.task(index)
        torch.testing.assert_close(model(part)[name][0], losses[name][0], rtol=1e-6, atol=1e-7)
        assert part.loss_terms == tuple(count if t == index else 0 for t, count in enumerate(batch.loss_terms))


def test_formulas(model: MultiTaskModel) -> None:
    """Losses equal torch's on padded scores; words without a label are ignored."""
    data = datasets()
    batch = pack([(found, np.arange(len(found))) for found in data])
    tags, _, which, _ = model.examples(batch)
    losses = model(batch)
    labels = torch.from_numpy(data[0].labels)
    expected = functional.cross_entropy(tags.outputs, labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(losses["tags"][0], expected)
    padded = torch.full((3, 5), -torch.inf, dtype=torch.float64)
    for row, (start, stop) in enumerate([(0, 2), (2, 7), (7, 10)]):
        padded[row, : stop - start] = which.outputs[start:stop, 0]
    choices = torch.from_numpy(data[2].labels)
    torch.testing.assert_close(losses["which"][0], functional.cross_entropy(padded, choices, reduction="sum"))


def test_task_gradients_are_those_of_a_pass_each(model: MultiTaskModel) -> None:
    batch = pack([(found, np.arange(len(found))) for found in datasets()])
    shared = model.shared_parameters()
    expected = [torch.autograd.grad(model(batch)[name][0], shared, allow_unused=True) for name in TASKS]
    sink = StackSink(shared, len(TASKS))
    with sink.armed(batch.input_ids.device):
        losses = model(batch, sink)
        terms = [(loss, 1.0) for loss, _ in losses.values()]
        sink.backward(terms, shared, [], {id(tensor): name for name, tensor in model.named_parameters()})
    sink.gramian()
    for task in range(len(TASKS)):
        for parameter, gradient in zip(shared, expected[task], strict=True):
            found = sink.task_gradient(parameter, task)
            largest = float(gradient.abs().max())
            assert found is not None
            torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-9 + 1e-5 * largest)


def test_scores_have_the_order_of_the_units(model: MultiTaskModel) -> None:
    """Batches of at most 16 tokens have the rows in another order than the data set."""
    data = dict(zip(TASKS, datasets(), strict=True))
    recipe = model.recipe.model_copy(update={"train": model.recipe.train.model_copy(update={"eval_tokens": 16})})
    found = score(model.predict, recipe, data)
    whole = model.predict(pack([(one, np.arange(len(one))) for one in data.values()]))
    for name, expected in whole.items():
        np.testing.assert_allclose(found[name].scores, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_softmax_of_segments_with_large_scores() -> None:
    units = pack([(dataset([2, 1, 3], kind="choice"), np.arange(3))]).units_of(0)
    assert units is not None
    scores = torch.tensor([1e4, 1e4 + 1, -5e3, 0.0, -1e4, 2.0], dtype=torch.float64, requires_grad=True)
    expected = torch.cat([part.log_softmax(0) for part in scores.split([2, 1, 3])])
    found = segment_log_softmax(scores, units)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(6.0, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), scores)[0] for x in (found, expected)))
