"""Type multilabel in the model: the formulas of transformers, and rows of numbers in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_batches import build_batch, build_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.heads import build_head
from fastmtl.model.heads.outputs import predictions
from fastmtl.model.losses.smart import divergence
from fastmtl.model.multitask import MultiTaskModel

MakeModel = Callable[..., MultiTaskModel]

SETS = {"type": "multilabel", "label_names": ["red", "blue", "green"], "data": {}}
BINARY = {"type": "binary", "data": {}, "pooling": "mean"}


def labelled(batch: PackedBatch, rows: int) -> tuple[PackedBatch, Tensor]:
    """Return the batch with random sets as labels of its first task, and these sets."""
    sets = torch.randint(0, 2, (rows, 3), generator=torch.Generator().manual_seed(rows)).float()
    return dataclasses.replace(batch, labels=(sets, *batch.labels[1:])), sets


def test_loss_and_gradients_are_those_of_transformers(tiny_bert: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(tiny_bert, num_labels=3, problem_type="multi_label_classification")
    theirs = BertForSequenceClassification(config).eval()
    theirs.bert.save_pretrained(tmp_path)
    tasks = {"sets": {**SETS, "pooling": "pooler"}, "para": BINARY}
    model = build_model(tmp_path, tasks=tasks).eval().double()
    theirs.double().classifier.load_state_dict(model.heads[0].dense.state_dict())
    lengths = [5, 1, 9, 7]
    batch, sets = labelled(build_batch([lengths, [4, 6]]), 4)
    ids, types, mask = (torch.zeros(4, max(lengths), dtype=torch.int64) for _ in range(3))
    for row, length in enumerate(lengths):
        tokens = slice(batch.host.cu_seqlens[row], batch.host.cu_seqlens[row + 1])
        ids[row, :length], types[row, :length] = batch.input_ids[tokens], batch.token_type_ids[tokens]
        mask[row, :length] = 1
    expected = theirs(ids, mask, types, labels=sets.double()).loss
    loss, count = model(batch)["sets"]
    assert count == 4
    torch.testing.assert_close(loss / count, expected, rtol=1e-12, atol=0)
    expected.backward()
    (loss / count).backward()
    ours = {name: tensor.grad for name, tensor in model.named_parameters()}
    for name, tensor in theirs.named_parameters():
        found = ours[name.replace("bert.", "encoder.").replace("classifier.", "heads.0.dense.")]
        torch.testing.assert_close(found, tensor.grad, rtol=1e-8, atol=1e-14)


def test_heads_predictions_and_divergence(make_model: MakeModel) -> None:
    heads = [{"name": "mlp", "hidden": [8]}, {"projection": 8}, {"name": "lstm", "size": 6}]
    for head in heads:
        model = make_model(tasks={"sets": {**SETS, "head": head}, "para": BINARY}).eval()
        batch, sets = labelled(build_batch([[5, 1, 9], [4]]), 3)
        (found, _), p = model.examples(batch), model.predict(batch)["sets"]
        torch.testing.assert_close(p, found.outputs.sigmoid())
        expected = -(sets * p.log() + (1 - sets) * (1 - p).log()).mean(1).sum()
        torch.testing.assert_close(model(batch)["sets"][0], expected)
        assert model(batch.task(1))["sets"] == (0.0, 0)
    task = TaskConfig.model_validate(SETS)
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    p, q = predictions(task, x), predictions(task, y)
    both = (p - q) * (p / q).log() + (q - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(divergence(task, x, y), both.sum(1))


def test_bi_encoded_pairs(make_model: MakeModel) -> None:
    model = make_model(tasks={"sets": {**SETS, "pairs": "bi"}, "para": BINARY}).eval()
    batch, sets = labelled(build_batch([[5, 1, 9, 2], [4]], pairs=[True, False]), 2)
    loss, count = model(batch)["sets"]
    assert count == 2 and model.heads[0].dense.in_features == 3 * model.hidden_size
    p = model.predict(batch)["sets"]
    torch.testing.assert_close(loss, -(sets * p.log() + (1 - sets) * (1 - p).log()).mean(1).sum())


def test_a_cosine_is_no_set_of_labels() -> None:
    task = TaskConfig.model_validate({**SETS, "pairs": "bi", "head": {"name": "cosine"}})
    with pytest.raises(UserError, match="cosine gives one number, which does not fit a multilabel task"):
        build_head(task, 32, 0.02)
