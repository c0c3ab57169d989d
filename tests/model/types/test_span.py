"""Type span against transformers' BertForQuestionAnswering on equal weights, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from packed_batches import build_model
from transformers import BertForQuestionAnswering

from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.model.losses.smart import divergence

LENGTHS, LABELS = [9, 5, 12], [[4, 6], [0, 0], [10, 10]]
TASK = {"type": "span", "data": {}, "head": {"dropout": 0.0}}


def dataset() -> TokenizedDataset:
    random, offsets = np.random.default_rng(0), np.concatenate([[0], np.cumsum(LENGTHS)])
    return TokenizedDataset(
        tokens=random.integers(5, 90, offsets[-1]).astype(np.int32),
        offsets=offsets,
        second_text=np.array([3, 2, 4], np.int32),
        sequences_per_example=1,
        labels=np.array(LABELS),
        ids=["0", "1", "2"],
        truncated=0,
        skipped=[],
        path=Path("made"),
        units=UnitTable(offsets, np.concatenate([np.arange(length) for length in LENGTHS]).astype(np.int32)),
    )


def test_losses_and_gradients_equal_bert_for_question_answering(tiny_bert: Path) -> None:
    model = build_model(tiny_bert, tasks={"span": TASK, "none": TASK}).double().eval()
    theirs = BertForQuestionAnswering.from_pretrained(tiny_bert).double().eval()
    with torch.no_grad():
        theirs.qa_outputs.weight.copy_(model.heads[0].get_parameter("dense.weight"))
        theirs.qa_outputs.bias.copy_(model.heads[0].get_parameter("dense.bias"))
    data = dataset()
    losses = model(pack([(data, np.arange(3)), (data, np.arange(0))]))
    loss, terms = losses["span"]
    loss.backward()
    assert terms == 3 and loss.dtype == torch.float64 and losses["none"] == (0.0, 0)
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(part.astype(np.int64)) for part in np.split(data.tokens, data.offsets[1:-1])],
        batch_first=True,
    )
    places = torch.arange(max(LENGTHS))
    expected = []
    for row, (start, end) in enumerate(LABELS):  # one by one: transformers' softmax reads padding too
        length = LENGTHS[row]
        given = {
            "input_ids": ids[row : row + 1, :length],
            "token_type_ids": (places[None, :length] >= int(data.second_text[row])).long(),
        }
        ends = {"start_positions": torch.tensor([start]), "end_positions": torch.tensor([end])}
        expected.append(theirs(**given, **ends).loss)
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    torch.stack(expected).sum().backward()
    for ours, name in (("heads.0.dense.weight", "qa_outputs.weight"), ("heads.0.dense.bias", "qa_outputs.bias")):
        torch.testing.assert_close(model.get_parameter(ours).grad, theirs.get_parameter(name).grad)
    words = theirs.bert.embeddings.word_embeddings.weight.grad
    assert words is not None and words.abs().max() > 1e-6
    torch.testing.assert_close(model.encoder.tables[0].grad, words)


def test_the_distance_of_smart_is_that_of_both_softmaxes(tiny_bert: Path) -> None:
    task = build_model(tiny_bert, tasks={"span": TASK}).recipe.tasks["span"]
    units = pack([(dataset(), np.arange(3))]).units_of(0)
    p, q = torch.randn(2, sum(LENGTHS), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        sum((torch.softmax(a, 0) - torch.softmax(b, 0)) @ (a.log_softmax(0) - b.log_softmax(0)) for a, b in ends) / 2
        for ends in (zip(a.T, b.T, strict=True) for a, b in zip(p.split(LENGTHS), q.split(LENGTHS), strict=True))
    ]
    torch.testing.assert_close(divergence(task, p, q, units), torch.stack(expected))
