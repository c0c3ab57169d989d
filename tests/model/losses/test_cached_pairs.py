"""Negatives of a whole step: losses and gradients equal those of one large batch, with dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.losses.cached_pairs import cache_pairs
from fastmtl.model.multitask import MultiTaskModel

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]

TASK = {
    "type": "regression",
    "range": [0, 5],
    "pairs": "bi",
    "pooling": "mean",
    "data": {},
    "loss": ["mse", "mnr"],
    "head": {"dropout": 0.5},
}


def tasks(*, cached: bool) -> dict:
    sts = {**TASK, "mnr": {"cached": cached, "similar": 0.3, "scale": 4.0}}
    return {
        "sst": {"type": "classification", "num_labels": 5, "data": {}},
        "para": {"type": "binary", "data": {}},
        "sts": sts,
    }


LENGTHS = [[5], [4], [6, 3, 8, 8, 2, 5, 4, 4, 9, 3]]


def test_dropout_masks_repeat(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS, pairs=[False, False, True])
    results = []
    for cached in (False, True):
        model = make_model(tasks=tasks(cached=cached))
        torch.manual_seed(5)
        (step,) = cache_pairs(model, [batch])
        torch.rand(3)  # random numbers between the passes change nothing
        if not cached:
            assert step is batch
            torch.manual_seed(5)
        loss = model(step)["sts"][0]
        results.append((loss.detach(), torch.autograd.grad(loss, list(model.encoder.parameters()))))
    torch.testing.assert_close(results[1][0], results[0][0])
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_micro_batches_see_each_others_pairs(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS, pairs=[False, False, True])
    model = make_model(tasks=tasks(cached=True)).eval()
    other = dataclasses.replace(batch, labels=(*batch.labels[:2], batch.labels[2].flip(0)))
    alone = model(cache_pairs(model, [batch])[0])["sts"][0]
    together = model(cache_pairs(model, [batch, other])[0])["sts"][0]
    assert together > alone + 0.1  # twice as many negatives


def test_needs_the_step_and_one_dtype(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(tasks=tasks(cached=True))
    with pytest.raises(ValueError, match="task 'sts': mnr.cached: give the step's micro-batches to cache_pairs first"):
        model(make_batch(LENGTHS, pairs=[False, False, True]))
    with pytest.raises(UserError, match="tasks.sts: mnr.cached: its first pass runs without deepspeed.torch_autocast"):
        make_model(tasks=tasks(cached=True), deepspeed={"torch_autocast": {"enabled": True}})


def test_a_head_that_no_loss_trains_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=r"the weights of the linear head would stay random.*\[mse, mnr\]"):
        make_model(tasks={"sts": {**TASK, "loss": "mnr"}})
    make_model(tasks={"sts": {**TASK, "loss": "mnr", "head": {"name": "cosine", "projection": 4}}})
