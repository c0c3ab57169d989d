"""SMART's terms, compared with its formulas and algorithm 1 sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.losses.smart import divergence
from fastmtl.model.multitask import MultiTaskModel

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]

TASKS: dict[str, dict[str, Any]] = {
    "sst": {"type": "classification", "num_labels": 5},
    "para": {"type": "binary", "pooling": "mean"},
    "sts": {"type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean"},
}
LENGTHS = [[5, 1, 9], [7, 12], [6, 3, 8, 8]]
PAIRS = [False, False, True]


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log() + q * (q / p).log()).sum(1)


def test_divergences() -> None:
    one, two = torch.randn(2, 4, 3, dtype=torch.float64)
    classes = TaskConfig.model_validate({"type": "classification", "num_labels": 3, "data": {}})
    torch.testing.assert_close(divergence(classes, one, two), symmetric_kl(one.softmax(1), two.softmax(1)))
    x, y = one[:, :1], two[:, :1]
    p, q = (torch.cat([z.sigmoid(), 1 - z.sigmoid()], dim=1) for z in (x, y))
    binary = TaskConfig.model_validate({"type": "binary", "data": {}})
    torch.testing.assert_close(divergence(binary, x, y), symmetric_kl(p, q))
    score = TaskConfig.model_validate({"type": "regression", "range": [0, 5], "data": {}})
    torch.testing.assert_close(divergence(score, x, y), (x - y)[:, 0] ** 2)
    bins = TaskConfig.model_validate({**score.model_dump(), "loss": "cross_entropy", "bins": 3})
    torch.testing.assert_close(divergence(bins, one, two), symmetric_kl(one.softmax(1), two.softmax(1)))


def test_small_divergences_are_not_rounding() -> None:
    task = TaskConfig.model_validate({"type": "classification", "num_labels": 3, "data": {}})
    p = torch.randn(9, 3)
    q = p + 1e-4 * torch.randn(9, 3)
    torch.testing.assert_close(
        divergence(task, p, q).double(), divergence(task, p.double(), q.double()), rtol=0.02, atol=1e-12
    )


def adversarial(model: MultiTaskModel, batch: PackedBatch, noise: Tensor) -> dict[str, Tensor]:
    """Return the terms of every task by algorithm 1 in plain loops."""
    config, tasks = model.recipe.smart, list(model.recipe.tasks.values())
    clean = [found.outputs for found in model.examples(batch)]
    cu = batch.cu_seqlens.tolist()
    noise = noise.clone()
    for _ in range(config.steps):
        leaf = noise.clone().requires_grad_()
        found = model.examples(batch, noise=leaf)
        terms = (divergence(t, f.outputs, c.detach()).sum() for t, f, c in zip(tasks, found, clean, strict=True))
        (gradient,) = torch.autograd.grad(sum(terms, start=torch.zeros(())), leaf)
        for start, stop in zip(cu, cu[1:], strict=False):
            step = gradient[start:stop] / gradient[start:stop].abs().max()
            noise[start:stop] = (noise[start:stop] + config.step_size * step).clamp(-config.epsilon, config.epsilon)
    found = model.examples(batch, noise=noise)
    terms = (divergence(t, f.outputs, c).sum() for t, f, c in zip(tasks, found, clean, strict=True))
    return dict(zip(model.recipe.task_names, terms, strict=True))


SMART = {"noise": 0.05, "epsilon": 0.3, "step_size": 0.28}


def larger(model: MultiTaskModel) -> MultiTaskModel:
    """Return a model whose outputs depend on the perturbation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 5
    return model


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_term(steps: int, make_model: MakeModel, make_batch: MakeBatch) -> None:
    strengths = {"sst": 2.0, "para": 0.5, "sts": 1.0}
    model = larger(make_model(smart={**SMART, "steps": steps, "strength": strengths}).eval().double())
    batch = make_batch(LENGTHS, pairs=PAIRS)
    torch.manual_seed(4)
    found = model(batch)
    torch.manual_seed(4)
    noise = model.smart.noise(batch, torch.device("cpu"), 32)
    terms = adversarial(model, batch, noise)
    ours, theirs = [], []
    for name, strength in strengths.items():
        assert terms[name] > 0.01
        ours.append(found[name][0] - plain_loss(model, batch, name))
        theirs.append(strength * terms[name])
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-4, atol=1e-6)
    mixed = zip(
        *(torch.autograd.grad(x[0] + 3 * x[1] - 2 * x[2], list(model.parameters())) for x in (ours, theirs)),
        strict=True,
    )
    for one, two in mixed:
        assert (one - two).norm() <= 1e-4 * two.norm() + 1e-6


def plain_loss(model: MultiTaskModel, batch: PackedBatch, name: str) -> Tensor:
    smart, model.smart = model.smart, None
    loss = model(batch)[name][0]
    model.smart = smart
    return loss


def test_ascent_finds_more_than_chance(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS, pairs=PAIRS)
    terms = []
    for step_size in (1e-9, 0.3):
        model = larger(make_model(smart={**SMART, "step_size": step_size, "strength": 1.0}).eval())
        torch.manual_seed(4)
        names = model.recipe.task_names
        terms.append(sum((model(batch)[name][0] - plain_loss(model, batch, name)).item() for name in names))
    assert terms[1] > 5 * terms[0] > 0


def test_the_dropout_masks_of_all_passes_are_the_same(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """A tiny perturbation gives a tiny term, and later random numbers are unchanged."""
    batch = make_batch(LENGTHS, pairs=PAIRS)
    tiny = {"noise": 1e-6, "epsilon": 1e-6, "strength": 1.0, "proximal": 1.0}
    model, plain = make_model(smart=tiny), make_model()
    model.smart.start_teacher(model)
    torch.manual_seed(4)
    expected = plain(batch)
    torch.manual_seed(4)
    found = model(batch)
    for name, (loss, _) in found.items():
        torch.testing.assert_close(loss, expected[name][0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(model(batch)["sst"][0], found["sst"][0])  # different masks


def test_proximal_term_and_teacher(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(smart={"proximal": {"sst": 3.0}, "momentum": 0.75}).eval()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    with pytest.raises(ValueError, match="call start_teacher before the first step"):
        model(batch)
    model.smart.start_teacher(model)
    names = [name for name, _ in model.named_parameters()]
    assert not any("teacher" in name for name in [*names, *model.state_dict()])
    torch.testing.assert_close(model(batch)["sst"][0], plain_loss(model, batch, "sst"))
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.smart.follow_model(model)
    for old, teacher, now in zip(before, model.smart.teacher.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(teacher, 0.75 * old + 0.25 * now)
    found = model(batch)
    p, q = (m.examples(batch)[0].outputs.softmax(1) for m in (model, model.smart.teacher))
    expected = plain_loss(model, batch, "sst") + 3 * symmetric_kl(p, q.detach()).sum()
    torch.testing.assert_close(found["sst"][0], expected)
    for ours, theirs in zip(
        torch.autograd.grad(found["sst"][0], list(model.encoder.parameters())),
        torch.autograd.grad(expected, list(model.encoder.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["sts"][0], plain_loss(model, batch, "sts"))


def test_strength_follows_the_gap(make_model: MakeModel, make_batch: MakeBatch) -> None:
    with pytest.raises(UserError, match="smart.follows: gap needs dev rows of every task with a term; sst has no dev"):
        make_model(smart={"strength": 1.0, "follows": "gap"})
    tasks = {name: {**task, "data": {"dev": "dev.tsv"}} for name, task in TASKS.items()}
    model = make_model(smart={**SMART, "strength": 1.0, "follows": "gap"}, tasks=tasks).eval()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    assert not model.smart.active  # the gap is not known yet
    plain = {name: plain_loss(model, batch, name) for name in model.recipe.task_names}
    assert all(torch.equal(model(batch)[name][0], loss) for name, loss in plain.items())
    added = []
    for gap in (0.2, 0.4):
        model.smart.follow({"sst": gap, "para": -0.1})
        torch.manual_seed(0)
        found = model(batch)
        added.append(found["sst"][0] - plain["sst"])
        torch.testing.assert_close(found["para"][0], plain["para"])
    torch.testing.assert_close(added[1], 2 * added[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"smart": {"strength": {"stss": 1.0}}}, "unknown task in smart.strength 'stss'. Did you mean 'sts'"),
        ({"smart": {"proximal": 1.0}, "engine": {"zero": 3}}, "smart with engine.zero: 3.*use engine.zero 0, 1 or 2"),
        ({"smart": {"strength": 1.0}, "engine": {"precision": "bf16"}}, "smart.noise: 1e-05 is lost: bf16 rounds"),
        (
            {"smart": {"strength": 1.0, "noise": 0.1}, "deepspeed": {"torch_autocast": {"enabled": True}}},
            "smart.epsilon: 1e-05 is lost: bf16",
        ),
    ],
)
def test_what_cannot_work_is_refused(sections: dict, message: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=message):
        make_model(**sections)
