"""Type tokens against transformers' token classification on equal weights, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_families import save_encoder_of
from packed_batches import build_model
from transformers import AutoModelForTokenClassification

from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.model.encoder.families import FAMILIES

LENGTHS = [7, 3, 12]
TASK = {"type": "tokens", "label_names": ["A", "B", "C"], "data": {}, "head": {"dropout": 0.0}}


def dataset(labels: np.ndarray) -> TokenizedDataset:
    """Return examples of random tokens; those with a label are units. labels: [tokens]."""
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    chosen = [np.flatnonzero(labels[a:b] >= 0) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    counts = np.array([len(places) for places in chosen])
    starts = np.concatenate([[0], np.cumsum(counts)])
    return TokenizedDataset(
        tokens=np.random.default_rng(1).integers(5, 90, sum(LENGTHS)).astype(np.int32),
        offsets=offsets,
        second_text=np.array(LENGTHS, dtype=np.int32),
        sequences_per_example=1,
        labels=labels[labels >= 0],
        ids=["0", "1", "2"],
        truncated=0,
        skipped=[],
        path=Path("made"),
        units=UnitTable(starts, np.concatenate(chosen).astype(np.int32), labelled=True),
        loss_terms=counts,
    )


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_loss_and_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    save_encoder_of(case, tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    kept = {"num_labels": 3, "attn_implementation": "eager"}
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path, **kept).double().train()
    model = build_model(tmp_path, tasks={"tags": TASK}).double().train()
    with torch.no_grad():
        theirs.classifier.weight.copy_(model.heads[0].get_parameter("dense.weight"))
        theirs.classifier.bias.copy_(model.heads[0].get_parameter("dense.bias"))

    labels = np.random.default_rng(0).integers(0, 3, sum(LENGTHS))
    labels[np.random.default_rng(2).random(len(labels)) < 0.4] = -100  # special tokens and further pieces
    data = dataset(labels)
    total, terms = model(pack([(data, np.arange(3))]))["tags"]
    (total / terms).backward()

    def pad(values: np.ndarray, fill: int) -> torch.Tensor:
        parts = torch.from_numpy(values.astype(np.int64)).split(LENGTHS)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    mask = pad(np.ones(sum(LENGTHS)), 0)
    loss = theirs(input_ids=pad(data.tokens, 1), attention_mask=mask, labels=pad(labels, -100)).loss
    loss.backward()
    assert terms == (labels >= 0).sum() and total.dtype == torch.float64
    torch.testing.assert_close(total / terms, loss)

    file_name, reference = FAMILIES[theirs.config.model_type].file_name, dict(theirs.base_model.named_parameters())
    pairs = {name: (p.grad, reference[file_name(name)].grad) for name, p in model.encoder.named_parameters()}
    pairs["weight"] = (model.heads[0].get_parameter("dense.weight").grad, theirs.classifier.weight.grad)
    pairs["bias"] = (model.heads[0].get_parameter("dense.bias").grad, theirs.classifier.bias.grad)
    assert len(pairs) == sum(1 for _ in theirs.parameters())
    for name, (found, expected) in pairs.items():
        assert found is not None and expected is not None
        assert (found - expected).norm() <= 1e-11 + 1e-10 * expected.norm(), name


def test_a_model_with_a_crf(tiny_bert: Path) -> None:
    """Every batch gives gradients to the transitions; predicted tags follow the scheme."""
    names = ["O", "B-X", "I-X"]
    task = {**TASK, "label_names": names, "tokens": {"scheme": "bio"}, "loss": "crf"}
    model = build_model(tiny_bert, tasks={"tags": task}).eval()
    labels = np.random.default_rng(0).integers(0, 3, sum(LENGTHS))
    data = dataset(labels)
    crf = {name: p for name, p in model.heads[0].named_parameters() if name.startswith("crf.")}
    assert len(crf) == 3
    for rows, zero in ((np.arange(3), False), (np.arange(0), True)):
        loss, terms = model(pack([(data, rows)]))["tags"]
        assert terms == (0 if zero else len(labels))
        for gradient in torch.autograd.grad(loss, list(crf.values())):
            assert bool((gradient == 0).all()) == zero
    with torch.no_grad():
        model.heads[0].get_parameter("dense.bias").copy_(torch.tensor([3.0, 2.0, 4.0]))
    found = model.predict(pack([(data, np.arange(3))]))["tags"]
    assert found.shape == (len(labels), 4)
    for tags in found[:, 0].long().split(LENGTHS):  # I-X has the largest scores, and may not begin a sentence
        assert tags.tolist() == [1, *[2] * (len(tags) - 1)]
