"""DeepSpeed's configuration: what a recipe becomes, and what may not contradict it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmtl.config import Recipe, parse_recipe
from fastmtl.engine.build import lr_factor
from fastmtl.engine.settings import deepspeed_config
from fastmtl.errors import UserError


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"tasks": {"a": {"type": "binary", "data": {}}}, **sections}, "test")


def test_a_recipe_becomes_deepspeeds_settings() -> None:
    engine = {"zero": 2, "precision": "bf16", "accumulation": 3, "clip": 0.5}
    config = deepspeed_config(recipe(engine=engine), 2, cpu=True)
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (3, 0.5)


def test_clipping_is_written_out_even_when_off() -> None:
    assert deepspeed_config(recipe(engine={"clip": 0}), 1, cpu=True)["gradient_clipping"] == 0


def test_the_users_block_passes_through() -> None:
    given = {"zero_optimization": {"reduce_bucket_size": 1000, "stage": 1}, "wall_clock_breakdown": True}
    config = deepspeed_config(recipe(deepspeed=given), 1, cpu=True)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 1 and config["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("given", "ours", "theirs"),
    [
        ({"zero_optimization": {"stage": 2}}, "engine.zero: 1", "deepspeed.zero_optimization.stage: 2"),
        ({"gradient_accumulation_steps": 4}, "engine.accumulation: 1", "deepspeed.gradient_accumulation_steps: 4"),
        ({"gradient_clipping": 5.0}, "engine.clip: 1.0", "deepspeed.gradient_clipping: 5.0"),
        ({"bf16": {"enabled": True}}, "engine.precision: fp32", "deepspeed.bf16.enabled: True"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "engine.offload: False",
            "deepspeed.zero_optimization.offload_optimizer.device: cpu",
        ),
        ({"optimizer": {"type": "Adam"}}, "section `optimizer`", "deepspeed.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "section `schedule`", "deepspeed.scheduler"),
        ({"train_batch_size": 32}, "sampler.batch_size", "deepspeed.train_batch_size"),
        ({"amp": {"enabled": True}}, "engine.precision", "deepspeed.amp"),
    ],
)
def test_contradictions_name_both_keys(given: dict[str, Any], ours: str, theirs: str) -> None:
    with pytest.raises(UserError) as error:
        deepspeed_config(recipe(deepspeed=given), 1, cpu=True)
    assert ours in str(error.value) and theirs in str(error.value)


@pytest.mark.parametrize(
    ("engine", "cpu", "message"),
    [
        ({"precision": "fp16"}, True, "fp16 needs a GPU"),
        ({"precision": "fp16", "zero": 0}, False, "use engine.zero: 1"),
        ({"offload": True, "zero": 0}, True, "engine.offload needs engine.zero 1, 2 or 3"),
    ],
)
def test_what_deepspeed_cannot_train(engine: dict[str, Any], cpu: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        deepspeed_config(recipe(engine=engine), 1, cpu=cpu)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_schedules(name: str, middle: float, end: float) -> None:
    factor = lr_factor(recipe(schedule={"name": name, "warmup": 0.1}), 100)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(middle)
    assert factor(100) == pytest.approx(end, abs=1e-9)
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([parameter], lr=2.0), factor)
    assert schedule.get_last_lr() == pytest.approx([0.2])
