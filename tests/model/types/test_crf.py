"""The CRF against the enumeration of all sequences of tags, in float64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.data.tags import allowed
from fastmtl.errors import UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.types.crf import Crf

NAMES = {"none": ["A", "B", "C"], "bio": ["O", "B-X", "I-X", "B-Y", "I-Y"], "iobes": ["O", "B-X", "I-X", "E-X", "S-X"]}
COUNTS = [3, 0, 1, 4, 2]
MakeModel = Callable[..., MultiTaskModel]


def made(scheme: str, counts: list[int]) -> tuple[Crf, Tensor, Units]:
    """Return a CRF with random weights, scores [U, C] and units. counts: units of each example."""
    names = NAMES[scheme]
    task = TaskConfig.model_validate({"type": "tokens", "label_names": names, "tokens": {"scheme": scheme}, "data": {}})
    torch.manual_seed(0)
    crf = Crf(len(names), allowed(task)).double()
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    example = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    units = Units(example, torch.from_numpy(offsets), None, tuple(offsets.tolist()))
    return crf, torch.randn(int(offsets[-1]), len(names), dtype=torch.float64, requires_grad=True), units


def sequences(crf: Crf, x: Tensor, fits: Callable[[tuple[int, ...]], bool]) -> tuple[list[tuple[int, ...]], Tensor]:
    """Return all sequences of tags that fit, and their scores. x: [n, C] of one example."""
    found = [y for y in itertools.product(range(x.shape[1]), repeat=len(x)) if fits(y)]
    scores = [
        crf.start_bias[y[0]]
        + crf.end_bias[y[-1]]
        + sum(x[t, tag] for t, tag in enumerate(y))
        + sum((crf.transitions_bias[a, b] for a, b in itertools.pairwise(y)), x.new_zeros(()))
        for y in found
    ]
    return found, torch.stack(scores)


def test_loss_and_gradients_equal_enumeration() -> None:
    """Words without a label may have any tag; an example without words has no loss."""
    crf, x, units = made("none", COUNTS)
    labels = torch.tensor([0, -100, 2, 1, 2, 2, -100, -100, 0, 1])
    losses = crf(x, units, labels)
    expected = []
    for part, own in zip(x.split(COUNTS), labels.split(COUNTS), strict=True):
        if not len(part):
            expected.append(x.new_zeros(()))
            continue
        every = sequences(crf, part, lambda y: True)[1]
        known, tags = own.numpy() >= 0, own.numpy()
        fitting = sequences(crf, part, lambda y: bool((np.array(y) == tags)[known].all()))[1]  # noqa: B023 - called here
        expected.append(every.logsumexp(0) - fitting.logsumexp(0))
    torch.testing.assert_close(losses, torch.stack(expected))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    inputs = [x, *crf.parameters()]
    found, wanted = (torch.autograd.grad((weights * loss).sum(), inputs) for loss in (losses, torch.stack(expected)))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("scheme", NAMES)
def test_predictions_equal_enumeration(scheme: str) -> None:
    crf, x, units = made(scheme, COUNTS)
    with torch.no_grad():
        found = crf(x, units).split(COUNTS)
    for part, own in zip(x.detach().split(COUNTS), found, strict=True):
        if not len(part):
            continue
        every, scores = sequences(crf, part, lambda y: fits(scheme, [NAMES[scheme][tag] for tag in y]))
        assert tuple(own[:, 0].long().tolist()) == every[int(scores.argmax())]
        p = scores.softmax(0)
        chosen = torch.nn.functional.one_hot(torch.tensor(every), part.shape[1])
        torch.testing.assert_close(own[:, 1:], (p[:, None, None] * chosen).sum(0))


def fits(scheme: str, tags: list[str]) -> bool:
    """Return whether a scheme allows a sequence of tags, written as entities and single O."""
    letters = "".join({"O": "o"}.get(tag, tag[0] + tag[2:] + " ") for tag in tags)
    entity = {"none": None, "bio": "BX (IX )*|BY (IY )*", "iobes": "SX |BX (IX )*EX "}[scheme]
    return entity is None or re.fullmatch(f"(o|{entity})*", letters) is not None


def test_a_batch_without_examples_has_gradients_of_zero() -> None:
    crf, x, units = made("none", [2])
    losses = crf(x[:0], units.none(), torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,) and crf(x[:0], units.none()).shape == (0, 4)
    for gradient in torch.autograd.grad(losses.sum(), list(crf.parameters())):
        assert not gradient.any()


def test_large_scores_are_exact_in_float32() -> None:
    crf, x, units = made("none", COUNTS)
    labels = torch.randint(0, 3, (len(x),))
    wide = crf(1e3 * x, units, labels)
    torch.testing.assert_close(crf.float()((1e3 * x).float(), units, labels).double(), wide, rtol=1e-6, atol=2e-3)


def test_smart_is_refused(make_model: MakeModel) -> None:
    task = {"type": "tokens", "label_names": ["A", "B"], "loss": "crf", "data": {}}
    make_model(tasks={"t": task}, smart={"strength": 0.0})
    with pytest.raises(UserError, match=r"^tasks.t: smart compares .* the loss crf rates whole sentences"):
        make_model(tasks={"t": task}, smart={"strength": 1.0})
