"""The examples of docs/extending.md run unchanged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from unit_rows import unit_rows

from fastmtl.config import TaskConfig
from fastmtl.config.types import TYPES
from fastmtl.data import samplers
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError
from fastmtl.inference.scores import Scores
from fastmtl.model import adapters
from fastmtl.model.heads import HEADS, pooling
from fastmtl.model.heads.features import features, num_features
from fastmtl.model.heads.outputs import num_outputs
from fastmtl.model.losses import task_loss as losses
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.types import UNIT_TYPES
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods.table import METHODS
from fastmtl.surgery.rules.table import RULES

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def examples() -> dict[str, Any]:
    names: dict[str, Any] = {
        "np": np,
        "torch": torch,
        "nn": nn,
        "Tensor": Tensor,
        "functional": functional,
        "TaskConfig": TaskConfig,
        "PackedBatch": PackedBatch,
        "features": features,
        "num_features": num_features,
        "num_outputs": num_outputs,
    }
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        code = "\n".join(line for line in block.splitlines() if "{..., " not in line)  # lines of the tables
        exec(compile(code, PAGE, "exec", dont_inherit=True), names)
    return names


def test_the_examples_train(
    examples: dict,
    make_model: Callable[..., MultiTaskModel],
    make_batch: Callable[..., PackedBatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(adapters.ADAPTERS, "scale_shift", examples["ScaleShift"])
    monkeypatch.setitem(HEADS, "residual", examples["ResidualHead"])
    monkeypatch.setitem(losses.LOSSES, "huber", losses.Loss(examples["huber"], ("regression",)))
    monkeypatch.setitem(pooling.POOLINGS, "last", examples["last"])
    settings = {"pooling": "last", "head": {"name": "residual"}, "data": {}}
    tasks = {
        "a": {"type": "classification", "num_labels": 5, **settings},
        "b": {"type": "binary", **settings},
        "c": {"type": "regression", "range": [0, 5], "pairs": "bi", "loss": "huber", **settings},
    }
    model = make_model(adapter={"name": "scale_shift"}, tasks=tasks)
    results = model(make_batch([[5, 1, 9], [7, 12], [6, 3, 8, 8]], pairs=[False, False, True]))
    sum(loss for loss, _ in results.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())  # type: ignore[arg-type]
    assert all(p.grad.any() for p in model.adapter.parameters())


def test_the_task_type_trains_and_is_evaluated(
    examples: dict, make_model: Callable[..., MultiTaskModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type tokens takes the example's place, as the recipe's types are fixed."""
    monkeypatch.setitem(TYPES, "tokens", examples["KEYWORDS"])
    monkeypatch.setitem(UNIT_TYPES, "tokens", examples["KEYWORDS_MODEL"])
    task = {"type": "tokens", "label_names": ["no", "yes"], "data": {}}
    model = make_model(tasks={"keys": task}, smart={"strength": 1.0})
    data = unit_rows("tokens", 6, np.random.default_rng(0), vocabulary=90, longest=9, tags=2)
    assert data.labels is not None and data.units is not None
    batch = pack([(data, np.arange(6))])
    loss, terms = model(batch)["keys"]
    loss.backward()
    assert terms == (data.labels >= 0).sum() < len(data.labels)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.heads.parameters())
    model.eval()
    logits = model.examples(batch)[0].outputs.squeeze(1)
    labelled = torch.from_numpy(data.labels >= 0)
    expected = functional.binary_cross_entropy_with_logits(
        logits[labelled], torch.from_numpy(data.labels)[labelled].float(), reduction="sum"
    )
    model.smart = None
    torch.testing.assert_close(model(batch)["keys"][0], expected)
    rows = Rows(Path("made"), data.ids, ["text"] * 6, None, data.labels)
    scores = Scores(dataclasses.replace(data, rows=rows), np.where(data.labels == 1, 0.75, 0.25))
    scores.scores[missed := int(np.flatnonzero(data.labels == 1)[0])] = 0.25
    config = model.recipe.tasks["keys"]
    found, number = examples["evaluate"](config, scores), int((data.labels == 1).sum())
    assert found[config.metric_name] == pytest.approx(1 - 1 / number)
    row = int(np.searchsorted(data.units.offsets, missed, side="right")) - 1
    assert examples["summary"](config, scores).errors.rows == [[str(row), "0.250"]]


def test_the_method_weighs(examples: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "equal_norms", examples["EqualNorms"])
    net = nn.Linear(3, 2)
    surgery = GradientSurgery(torch.optim.SGD(net.parameters()), "equal_norms", tasks=["a", "b", "c"])
    x = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]])
    info = surgery.run([x], lambda x: {"a": (net(x[:1]).sum(), 1), "b": (3 * net(x[1:]).sum(), 1)})
    assert info.weights is not None and info.task_norms is not None
    first, second, absent = info.task_norms.tolist()
    mean = (first + second) / 3
    assert absent == 0 and info.weights.tolist() == pytest.approx([mean / first, mean / second, 0.0])
    with pytest.raises(UserError, match="reduction='mean' is not for equal_norms"):
        GradientSurgery(torch.optim.SGD(net.parameters()), "equal_norms", tasks=["a"], reduction="mean")


def test_the_rule_gives_task_gradients(examples: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    used, found = [], []

    def rule(*args: Any) -> Tensor:
        used.append(args)
        return examples["scale_rule"](*args)

    monkeypatch.setitem(RULES, examples["Scale"].forward, rule)
    choices: tuple[Literal["one", "per_task"], ...] = "one", "per_task"
    for passes in choices:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), examples["Scale"](4), nn.Tanh())
        optimizer = torch.optim.SGD(net.parameters())
        surgery = GradientSurgery(optimizer, tasks=["a", "b"], model=net, passes=passes, verify_every=0, seed=0)
        with surgery.rows(["b", "a", "b", "a"]):
            y = net(torch.arange(24.0).view(4, 2, 3) / 24)
        surgery.backward({"a": (y[1::2].sum(), 2), "b": (-y[::2].square().sum(), 2)})
        found.append([parameter.grad for parameter in net.parameters()])
    assert len(used) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_sampler_gives_shares(examples: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samplers.SAMPLERS, "logarithmic", examples["logarithmic"])
    weights = samplers.find_sampler("logarithmic")(np.array([100, 400]), np.array([16, 16]), 0, 3)
    np.testing.assert_allclose(weights, np.log([100, 400]))
