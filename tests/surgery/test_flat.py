from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.config import parse_recipe
from fastmtl.engine.settings import deepspeed_config
from fastmtl.errors import UserError
from fastmtl.surgery.merged import Merged, unshared
from fastmtl.surgery.targets.find import find_target
from fastmtl.surgery.targets.flat import FlatParameters


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)
        self.second.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 2.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.second(self.first(self.table(ids)))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def flattened(model: Small) -> FlatParameters:
    matrices = [model.table.weight, model.first.weight, model.second.weight]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": [model.first.bias]}]
    return FlatParameters(model, groups, alone=[model.table.weight])  # type: ignore[list-item]


IDS = torch.tensor([0, 3, 3])


def test_what_an_optimiser_and_deepspeed_see(model: Small) -> None:
    expected = model(IDS)
    flat = flattened(model)
    seen = dict(flat.named_parameters())
    assert {name: tuple(p.shape) for name, p in seen.items()} == {
        "flat.0": (18,),
        "flat.1": (3,),
        "table.weight": (5, 4),
        "second.bias": (2,),
    }
    first, second = flat.groups
    assert first["params"] == [model.table.weight, seen["flat.0"]] and first["weight_decay"] == 0.1
    assert second["params"] == [seen["flat.1"]]
    assert torch.equal(flat(IDS), expected)
    with torch.no_grad():
        seen["flat.0"].zero_()
    assert model.first.weight.abs().sum() == 0 and torch.equal(flat(IDS)[0], 2 * model.second.bias)


@pytest.mark.parametrize(
    "moved",
    [
        lambda flat: [setattr(p, "data", p.data.bfloat16()) for p in flat.parameters()],
        lambda flat: flat.bfloat16(),
        lambda flat: [setattr(p, "data", p.data.clone()) for p in flat.parameters()],
    ],
    ids=["cast as DeepSpeed does", "module.bfloat16()", "in other storage"],
)
def test_views_follow(model: Small, moved: Callable[[FlatParameters], Any]) -> None:
    flat = flattened(model)
    moved(flat)
    flat(IDS)
    with torch.no_grad():
        flat.flat[0].fill_(0.5)
    assert torch.all(model.first.weight == 0.5) and model.first.weight.dtype == flat.flat[0].dtype
    assert torch.all(flat.state_dict()["second.weight"] == 0.5)


def test_names_of_a_saved_model_are_its_own(model: Small) -> None:
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = flattened(model)
    assert flat.state_dict().keys() == saved.keys()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    flat.load_state_dict(saved)
    assert torch.equal(flat.flat[0][:12].view(3, 4), saved["first.weight"])
    assert torch.equal(model.first.weight, saved["first.weight"])


def test_gradients_side_by_side_are_not_copied(model: Small) -> None:
    flat = flattened(model)
    merged = torch.arange(21.0)
    pieces = [piece.view(p.shape) for piece, p in zip(merged.split([12, 6, 3]), flat.leaves(), strict=False)]
    table = torch.ones(5, 4)
    keys = [id(parameter) for parameter in flat.leaves()]
    for same in (True, False):
        gradients = Merged(merged, dict(zip(keys, pieces, strict=False)))
        gradients[keys[-1]] = table
        if not same:
            gradients[keys[0]] = pieces[0].clone()
        first, second, alone = flat.gather(gradients)
        assert not gradients and alone is table
        assert (first.data_ptr() == merged.data_ptr()) == same and second.data_ptr() == pieces[2].data_ptr()
        assert torch.equal(first, merged[:18]) and torch.equal(second, merged[18:])


def test_a_step_drops_the_gradients_of_a_failed_one(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(
        module=flattened(model),
        device="cpu",
        zero_optimization_stage=lambda: 1,
        fp16_enabled=lambda: False,
        torch_autocast_enabled=lambda: False,
        zero_use_cpu_optimizer=lambda: False,
        register_forward_pre_hook=lambda _: None,
    )
    target = find_target(engine)
    found: list[Tensor] = []
    monkeypatch.setattr(type(target), "_carry", lambda _, gradients, *others: found.extend(gradients))
    target.backward(model(IDS).sum(), last=False)
    target.begin()
    target.backward(model(IDS).sum(), last=True)
    expected = torch.autograd.grad(model(IDS).sum(), [model.first.bias])
    assert any(torch.equal(gradient, expected[0]) for gradient in found if gradient.shape == (3,))


def test_what_autograd_shares_is_changed_apart() -> None:
    a, b, c = (torch.ones(3, requires_grad=True) for _ in range(3))
    found = unshared(list(torch.autograd.grad((a + b).sum() + c.sum(), [a, b, c])))
    torch._foreach_mul_(found, 3.0)
    assert all(torch.equal(gradient, torch.full((3,), 3.0)) for gradient in found)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (lambda m: [{"params": [m.first.weight, m.second.bias]}], "parameter second.bias is not"),
        (lambda m: [{"params": [m.first.weight]}, {"params": [m.first.weight]}], "first.weight is not the model's"),
        (lambda m: [{"params": [nn.Parameter(torch.ones(7))]}], r"of shape \(7,\)"),
        (lambda m: [{"params": [m.first.weight, m.second.double().weight]}], "float32.* and .*float64"),
    ],
)
def test_groups_that_cannot_be_flat(model: Small, groups: Callable[[Small], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FlatParameters(model, groups(model))


@pytest.mark.parametrize("engine", [{"zero": 3}, {"zero": 2, "offload": True}])
def test_where_weights_cannot_be_views(engine: dict[str, Any]) -> None:
    task = {"type": "binary", "data": {"train": "none"}}
    recipe = parse_recipe({"tasks": {"kind": task}, "engine": {**engine, "flat_parameters": True}}, "test")
    with pytest.raises(UserError, match="flat_parameters is for ZeRO 0, 1 and 2 without offload"):
        deepspeed_config(recipe, 1, cpu=True)
