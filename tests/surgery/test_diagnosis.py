"""Cosines and norms by layer: those of T passes, without a change of the updates, and on a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_recorder import OpRecorder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel

from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.errors import UserError
from fastmtl.surgery import Diagnosis, GradientSurgery, diagnose
from fastmtl.surgery.diagnosis.layers import layers_of
from fastmtl.surgery.diagnosis.measured import Measured
from fastmtl.surgery.losses import Losses

TASKS, ROWS, STEPS = ["a", "b", "c"], 12, 3
LAYERS = ["embeddings", "encoder.layer.0", "encoder.layer.1"]


class Net(nn.Module):
    """A small BertModel, with a large table of words, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=2100,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.trunk = BertModel(size, add_pooling_layer=False)
        self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in TASKS)

    def losses(self, ids: Tensor, tasks: Tensor) -> Losses:
        states, labels = self.trunk(ids).last_hidden_state[:, 0], ids[:, 1] % 3
        chosen = [tasks == t for t in range(len(TASKS))]
        return {
            name: (cross_entropy(head(states[rows]), labels[rows], reduction="sum"), int(rows.sum()))
            for name, head, rows in zip(TASKS, self.heads, chosen, strict=True)
        }


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return ids [B, 7] and the task of each row; the last step has no row of the last task."""
    draw = torch.Generator().manual_seed(step)
    tasks = torch.arange(ROWS) % (2 if step == STEPS - 1 else 3)
    return torch.randint(0, 2100, (ROWS, 7), generator=draw), tasks


def train(measure: bool, micro_batches: int = 1, **options: Any) -> tuple[Tensor, Diagnosis | None, list[np.ndarray]]:
    """Return the final weights, the diagnosis, and each step's [L, T, T] by T passes."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    surgery = GradientSurgery(
        optimizer, **{"tasks": TASKS, "model": net.trunk, "verify_every": 0, "max_norm": 1.0, **options}
    )
    diagnosis = diagnose(surgery, every=1) if measure else None
    expected = []
    for step in range(STEPS):
        ids, tasks = batch(step)
        if measure:
            expected.append(by_passes(net, ids, tasks))

        def loss_fn(part: tuple[Tensor, Tensor]) -> Losses:
            with surgery.rows(part[1]):
                return net.losses(*part)

        parts = list(zip(ids.chunk(micro_batches), tasks.chunk(micro_batches), strict=True))
        counts = {name: int((tasks == t).sum()) for t, name in enumerate(TASKS)}
        assert surgery.run(parts, loss_fn, counts).skipped is None
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]), diagnosis, expected


def by_passes(net: Net, ids: Tensor, tasks: Tensor) -> np.ndarray:
    """Return [L, T, T], the Gramian of each layer, by one backward pass per task."""
    names, parameters = zip(*net.trunk.named_parameters(), strict=True)
    rows: list[list[list[Tensor]]] = [[] for _ in LAYERS]
    for loss, number in net.losses(ids, tasks).values():
        found = torch.autograd.grad(loss / max(number, 1), parameters, retain_graph=True)
        for layer, of_layer in zip(LAYERS, rows, strict=True):
            chosen = [g.flatten().double() for name, g in zip(names, found, strict=True) if name.startswith(layer)]
            of_layer.append(chosen)
    stacked = [torch.stack([torch.cat(of_task) for of_task in of_layer]) for of_layer in rows]
    return np.stack([(jacobian @ jacobian.T).numpy() for jacobian in stacked])


@pytest.mark.parametrize(
    ("micro_batches", "options"),
    [
        (1, {"storage": "stacked"}),
        (2, {"storage": "kept"}),
        (1, {"storage": "replay", "max_norm": None}),
        (2, {"storage": "replay", "max_norm": None}),
        (1, {"method": "equal", "passes": "per_task", "verify_every": None}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_layers_equal_passes_and_updates_keep_their_bits(micro_batches: int, options: dict[str, Any]) -> None:
    weights, diagnosis, expected = train(True, micro_batches, **options)
    assert diagnosis is not None and diagnosis.layers == LAYERS
    assert torch.equal(weights, train(False, micro_batches, **options)[0])
    steps, gramians = diagnosis.gramians()
    assert steps == [1, 2, 3]
    for found, wanted in zip(gramians, expected, strict=True):
        norms = np.sqrt(np.diagonal(wanted, axis1=1, axis2=2))
        np.testing.assert_array_less(
            np.abs(found - wanted), 1e-5 * norms[:, :, None] * norms[:, None, :] + 1e-12, strict=True
        )
    assert (gramians[-1, :, 2] == 0).all()  # no rows


def test_equal_is_joint_training() -> None:
    equal, joint = train(False, method="equal")[0], train(False, method="sum")[0]
    moved = joint - torch.cat([parameter.detach().flatten() for parameter in Net().parameters()])
    assert moved.norm() > 0.1 and (equal - joint).norm() <= 1e-5 * moved.norm()


def test_page_and_json_have_the_numbers(tmp_path: Path) -> None:
    _, diagnosis, expected = train(True)
    assert diagnosis is not None
    page = diagnosis.write(tmp_path / "found.html").read_text()
    numbers = json.loads((tmp_path / "found.json").read_text())
    assert numbers["steps"] == [1, 2, 3] and numbers["pairs"] == ["a/b", "a/c", "b/c"]
    assert numbers["layers"] == [*LAYERS, "all layers"]
    every = np.concatenate([np.stack(expected), np.stack(expected).sum(1, keepdims=True)], axis=1)
    with np.errstate(invalid="ignore"):
        norms = np.sqrt(np.diagonal(every, axis1=2, axis2=3))
        cosines = every / norms[:, :, :, None] / norms[:, :, None, :]
    for layer, name in enumerate(numbers["layers"]):
        for i, j in combinations(range(len(TASKS)), 2):
            found = cosines[:, layer, i, j]
            there = found[~np.isnan(found)]
            assert len(there) == (3 if j == 1 else 2)
            pair = f"{TASKS[i]}/{TASKS[j]}"
            assert numbers["mean_cosines"][name][pair] == pytest.approx(there.mean(), abs=1e-5)
            assert numbers["conflict_rates"][name][pair] == pytest.approx((there < 0).mean(), abs=1e-5)
            assert f">{there.mean():.2f}<small>{(there < 0).mean():.0%}</small>" in page
        for t, task in enumerate(TASKS):
            assert numbers["mean_norms"][name][task] == pytest.approx(norms[:, layer, t].mean(), rel=1e-4)
            assert f">{norms[:, layer, t].mean():.3g}</td>" in page
    assert numbers["cosines"][2][0][1] is None
    assert "http" not in page.replace("http://www.w3.org", "") and page.count("<svg") == 3


def test_steps_that_are_measured() -> None:
    net = Net()
    surgery = GradientSurgery(torch.optim.SGD(net.parameters(), lr=0.1), tasks=TASKS, model=net.trunk, verify_every=0)

    def step() -> None:
        with surgery.rows(batch(0)[1]):
            losses = net.losses(*batch(0))
        surgery.backward(losses)

    step()
    diagnosis = diagnose(surgery, every=2, layer_of=lambda name: name.rsplit(".", 1)[-1])
    assert diagnosis.layers == ["weight", "bias"]
    for _ in range(4):
        step()
    diagnosis.stop()
    step()
    assert diagnosis.gramians()[0] == [2, 4]


def test_steps_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    gramians = np.ones((3, 1, 2, 2))
    gramians[1, 0, 0, 0] = np.inf
    measured = Measured(["a", "b"], ["x"], [4, 5, 6], gramians)
    assert (measured.steps, measured.left_out) == ([4, 6], 1)


def test_layers_of_names() -> None:
    bert = ["embeddings.words.weight", "encoder.layer.0.a.weight", "encoder.layer.11.a.weight", "pooler.weight"]
    assert layers_of(bert) == ["embeddings", "encoder.layer.0", "encoder.layer.11", "pooler"]
    wrapped = ["net.trunk.words.weight", "net.trunk.layers.0.a.weight", "net.trunk.token"]
    assert layers_of(wrapped) == ["net.trunk.words", "net.trunk.layers.0", "net.trunk.token"]
    assert layers_of(["weight"]) == ["weight"]


def recorded(surgery: GradientSurgery) -> None:
    surgery.record_with(lambda *given: record_merging(*given, recorder=OpRecorder()))


def untyped(value: Any) -> Any:
    return value


def with_features(surgery: GradientSurgery) -> None:
    features = torch.ones(2, requires_grad=True)
    surgery.backward({"a": (features.sum(), 2)}, features=features)


@pytest.mark.parametrize(
    ("options", "use", "text"),
    [
        ({"method": "sum"}, diagnose, 'use the method "equal", which gives the same sum'),
        ({"scope": "tensor"}, diagnose, "use scope='global' while you measure"),
        ({"reduce": "sketch"}, diagnose, "reduce='sketch' adds up all layers"),
        ({}, lambda surgery: diagnose(surgery, every=0), "every must be a positive number of steps, got 0"),
        ({}, lambda surgery: diagnose(untyped(None)), "surgery is of type NoneType: give a GradientSurgery"),
        ({}, lambda surgery: diagnose(surgery, layer_of=untyped("x")), "layer_of is of type str: give a function"),
        ({}, lambda surgery: (diagnose(surgery), diagnose(surgery)), "call stop\\(\\) of that diagnosis"),
        ({"model": None}, lambda surgery: (recorded(surgery), diagnose(surgery)), "leave cuda_graphs out"),
        ({"model": None}, lambda surgery: (diagnose(surgery), recorded(surgery)), "call its stop\\(\\) before"),
        ({}, lambda surgery: (diagnose(surgery), with_features(surgery)), "leave features out, or call stop"),
        ({}, lambda surgery: diagnose(surgery).write("x.html"), "x.html: no step has been measured yet"),
        ({}, lambda surgery: diagnose(surgery).write("x.json"), "x.json: the page is HTML"),
    ],
)
def test_refusals(options: dict[str, Any], use: Callable[[GradientSurgery], object], text: str) -> None:
    net = Net()
    given = {"tasks": TASKS, "model": net.trunk, "verify_every": 0, **options}
    surgery = GradientSurgery(torch.optim.SGD(net.parameters(), lr=0.1), **given)
    with pytest.raises(UserError, match=text):
        use(surgery)
