"""The owner of clipping: surgery if it has the whole gradient, otherwise DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fastmtl.config import Recipe, parse_recipe
from fastmtl.engine.gradient_norm import leave_norm_to_surgery, max_norm, surgery_clips
from fastmtl.engine.settings import deepspeed_config


class Model(nn.Module):
    """A model with a thousand shared numbers, and some of a task."""

    def __init__(self, own: int = 10, *, frozen: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(1000), requires_grad=not frozen)
        self.head = nn.Parameter(torch.zeros(own))

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.encoder]


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"tasks": {"a": {"type": "binary", "data": {}}}, **sections}, "test")


PCGRAD: dict[str, Any] = {"gradient": {"method": "pcgrad"}}
FULL = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("sections", "world", "model", "expected"),
    [
        (PCGRAD, 1, Model(), True),
        (PCGRAD, 8, Model(), True),
        (PCGRAD, 8, Model(own=100), False),  # a large adapter would need another reduction
        (PCGRAD, 1, Model(own=100), True),
        ({**PCGRAD, "engine": {"zero": 2, "accumulation": 4, "precision": "bf16"}}, 8, Model(), True),
        ({**PCGRAD, "engine": {"zero": 0}}, 1, Model(), True),
        ({**PCGRAD, "engine": {"zero": 0, "precision": "bf16"}}, 1, Model(), False),
        ({**PCGRAD, "engine": {"zero": 3}}, 1, Model(), False),
        ({**PCGRAD, "engine": {"offload": True}}, 1, Model(), False),
        ({**PCGRAD, "engine": {"precision": "fp16"}}, 1, Model(), False),
        ({**PCGRAD, "deepspeed": FULL}, 1, Model(), False),
        ({"gradient": {"method": "pcgrad", "storage": "kept"}}, 1, Model(), True),
        ({"gradient": {"method": "pcgrad", "storage": "replay"}}, 1, Model(), False),
        ({"gradient": {"method": "pcgrad", "scope": "tensor"}}, 1, Model(), False),
        ({"gradient": {"method": "pcgrad", "reduce": "local"}}, 1, Model(), False),
        ({"gradient": {"method": "pcgrad", "reduce": "sketch"}}, 1, Model(), False),
        ({"gradient": {"method": "sum"}}, 1, Model(), True),
        ({"gradient": {"method": "sum"}}, 2, Model(), False),
        ({"gradient": {"method": "sum"}, "engine": {"accumulation": 2}}, 1, Model(), False),
        ({"gradient": {"method": "sum"}, "engine": {"zero": 2}}, 1, Model(), False),
        ({"gradient": {"method": "sum"}, "engine": {"zero": 2, "flat_parameters": True}}, 1, Model(), True),
        (
            {**PCGRAD, "engine": {"accumulation": 2}},
            1,
            Model(frozen=True),
            False,
        ),  # the method is a sum, as nothing is shared
    ],
)
def test_who_clips(sections: dict[str, Any], world: int, model: Model, expected: bool) -> None:
    made = recipe(**sections)
    assert surgery_clips(made, model, world) == expected  # type: ignore[arg-type]
    assert max_norm(made, model, world) == (1.0 if expected else None)  # type: ignore[arg-type]


def test_without_clipping_the_norm_is_still_looked_at() -> None:
    assert max_norm(recipe(**PCGRAD, engine={"clip": 0.0}), Model(), 1) == math.inf  # type: ignore[arg-type]


def test_deepspeed_is_told() -> None:
    config = deepspeed_config(recipe(engine={"precision": "bf16"}), 1, cpu=True)
    leave_norm_to_surgery(config)
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"]["compute_grad_norm"] is config["bf16"]["check_grad_overflow"] is False


def test_checks_that_the_recipe_asks_for_stay() -> None:
    asked = {"zero_optimization": {"compute_grad_norm": True}, "bf16": {"check_grad_overflow": True}}
    config = deepspeed_config(recipe(engine={"precision": "bf16"}, deepspeed=asked), 1, cpu=True)
    leave_norm_to_surgery(config)
    assert config["zero_optimization"]["compute_grad_norm"] and config["bf16"]["check_grad_overflow"]
