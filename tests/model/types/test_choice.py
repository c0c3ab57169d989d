"""Type choice against transformers' BertForMultipleChoice on equal weights, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_batches import build_model
from ranked_groups import units_of
from torch import nn
from transformers import BertForMultipleChoice

from fastmtl.config import TaskConfig
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.model.examples import Examples
from fastmtl.model.losses.task_loss import build_loss

COUNTS, LABELS = [3, 2, 4], [2, 0, 1]
TASK = {"type": "choice", "pooling": "pooler", "data": {}, "head": {"dropout": 0.0}}


def dataset() -> TokenizedDataset:
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(COUNTS)])
    lengths = random.integers(4, 9, offsets[-1])
    return TokenizedDataset(
        tokens=random.integers(5, 90, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=(lengths - 2).astype(np.int32),
        sequences_per_example=1,
        labels=np.array(LABELS),
        ids=["0", "1", "2"],
        truncated=0,
        skipped=[],
        path=Path("made"),
        example_offsets=offsets,
        units=UnitTable(offsets, None),
    )


def test_losses_and_gradients_equal_bert_for_multiple_choice(tiny_bert: Path, tmp_path: Path) -> None:
    theirs = BertForMultipleChoice.from_pretrained(tiny_bert)
    theirs.save_pretrained(tmp_path)
    model = build_model(tmp_path, tasks={"which": TASK}).double().eval()
    theirs = theirs.double().eval()
    with torch.no_grad():
        theirs.classifier.weight.copy_(model.heads[0].get_parameter("dense.weight"))
        theirs.classifier.bias.copy_(model.heads[0].get_parameter("dense.bias"))
    data = dataset()
    loss, terms = model(pack([(data, np.arange(3))]))["which"]
    loss.backward()
    expected = []
    for row, label in enumerate(LABELS):  # transformers takes one number of choices per batch
        parts = range(*data.example_offsets[row : row + 2].tolist())
        sequences = [
            torch.from_numpy(data.tokens[data.offsets[s] : data.offsets[s + 1]].astype(np.int64)) for s in parts
        ]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        types = torch.stack([torch.arange(ids.shape[1]) >= int(data.second_text[s]) for s in parts]).long()
        mask = torch.stack([torch.arange(ids.shape[1]) < len(sequence) for sequence in sequences]).long()
        given = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
        expected.append(theirs(**{name: x[None] for name, x in given.items()}, labels=torch.tensor([label])).loss)
    assert terms == 3 and loss.dtype == torch.float64
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    torch.stack(expected).sum().backward()
    pairs = [
        ("heads.0.dense.weight", "classifier.weight"),
        ("encoder.pooler.dense.weight", "bert.pooler.dense.weight"),
        ("encoder.pooler.dense.bias", "bert.pooler.dense.bias"),
    ]
    for ours, name in pairs:
        torch.testing.assert_close(model.get_parameter(ours).grad, theirs.get_parameter(name).grad)
    words = theirs.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(model.encoder.tables[0].grad, words)
    assert words is not None and words.abs().max() > 1e-6


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.2}, {"loss": "focal", "focal_gamma": 1.5}])
def test_other_losses_are_those_of_each_row_as_classes(settings: dict[str, Any]) -> None:
    scores = torch.randn(sum(COUNTS), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores.requires_grad_()
    found = Examples(scores, scores, None, units_of(COUNTS))
    loss = build_loss(TaskConfig.model_validate({**TASK, **settings})).of_units(
        found, torch.tensor(LABELS), nn.Identity()
    )
    expected = []
    for row, label in zip(scores.squeeze(1).split(COUNTS), LABELS, strict=True):
        task = TaskConfig.model_validate({"type": "classification", "num_labels": len(row), "data": {}, **settings})
        expected.append(build_loss(task)(row[None], torch.tensor([label])).sum())
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (loss, torch.stack(expected).sum())))
