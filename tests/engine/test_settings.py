"""DeepSpeed's configuration from a recipe, and settings that may not contradict it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmtl.config import Recipe, parse_recipe
from fastmtl.engine.build import check_engine, lr_factor
from fastmtl.engine.settings import deepspeed_config, overlaps, set_buckets
from fastmtl.errors import UserError
from fastmtl.recipes import yaml_reader as recipe_yaml


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


@pytest.mark.parametrize(
    ("stage", "given", "overlap", "bucket"),
    [
        (1, {}, False, 100),  # one bucket is full only when backward ends
        (2, {"reduce_bucket_size": 40}, True, 40),
        (3, {}, True, 100),  # ZeRO 3 needs it to prefetch weights
        (2, {"overlap_comm": True}, True, 100),
        (1, {"reduce_bucket_size": 40, "overlap_comm": False}, False, 40),
    ],
)
def test_gradients_are_reduced_during_backward_where_that_hides_anything(
    stage: int, given: dict[str, Any], overlap: bool, bucket: int
) -> None:
    zero = {"stage": stage, **given}
    set_buckets(zero, 100, cpu=False)
    assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (overlap, bucket)
    assert not overlaps(stage, bucket, 100, cpu=True)


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
        ({"gradient_clipping": 5.5}, "engine.clip: 1.0", "deepspeed.gradient_clipping: 5.5"),
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
        ({"zero_optimization": {"cpu_offload": True}}, "engine.offload", "deepspeed.zero_optimization.cpu_offload"),
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


ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero_optimization: {reduce_bucket_size: x}", f"{ZERO}.reduce_bucket_size: Input should be a valid integer"),
        ("zero_optimization: {reduce_bucket_size: 0.5}", f"{ZERO}.reduce_bucket_size: Input should be a valid integer"),
        ("zero_optimization: {reduce_bucket_siez: 5}", f"unknown key '{ZERO}.reduce_bucket_siez'"),
        ("zero_optimization: {offload_optimizer: {pin: 1}}", f"unknown key '{ZERO}.offload_optimizer.pin'"),
        ("zero_optimization: {leaf_module: {classes: 5}}", f"{ZERO}.leaf_module.classes: Input should be a valid list"),
        ("zero_optimization: 5", f"{ZERO}: expected keys with values, found 5"),
        ("zero_optimization: {5: 6}", f"unknown key '{ZERO}.5'"),
        ("zero_optimisation: {stage: 1}", f"unknown key 'deepspeed.zero_optimisation'. Did you mean '{ZERO}'?"),
        ("activation_checkpointing: {profil: true}", "Did you mean 'deepspeed.activation_checkpointing.profile'?"),
        ("activation_checkpointing: 5", "deepspeed.activation_checkpointing: DeepSpeed refuses it"),
        ("checkpoint: {tag_validation: 5}", "deepspeed.checkpoint.tag_validation: expected text, found 5"),
        ("checkpoint: {tag_validation: often}", "deepspeed.checkpoint.tag_validation: DeepSpeed refuses it"),
        ("tensorboard: {enabled: maybe}", "deepspeed.tensorboard.enabled: Input should be a valid boolean"),
        ("steps_per_print: {a: 1}", "deepspeed.steps_per_print: expected a whole number, found {'a': 1}"),
        ("dataloader_drop_last: 5", "deepspeed.dataloader_drop_last: expected true or false, found 5"),
        ("gradient_predivide_factor: x", "deepspeed.gradient_predivide_factor: expected a number, found 'x'"),
        ("elasticity: {}", "deepspeed.elasticity: DeepSpeed refuses it: Elastic training has been removed"),
    ],
)
def test_what_deepspeed_does_not_take_is_refused_by_key_without_an_engine(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_engine(recipe(deepspeed=recipe_yaml.load(text)), 1)
    assert message in str(error.value)


def test_all_wrong_values_of_a_block_are_told_at_once() -> None:
    given = {"zero_optimization": {"reduce_bucket_size": -1, "allgather_bucket_size": "x"}}
    with pytest.raises(UserError) as error:
        check_engine(recipe(deepspeed=given), 1)
    assert [line.partition(":")[0] for line in error.value.lines] == [
        f"{ZERO}.reduce_bucket_size",
        f"{ZERO}.allgather_bucket_size",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "zero_optimization: {reduce_bucket_size: 5e8, offload_optimizer: {pin_memory: false}}",
        "{aio: {block_size: 1e6}, wall_clock_breakdown: true, gradient_predivide_factor: 2}",
        "{activation_checkpointing: {profile: true}, checkpoint: {tag_validation: Ignore}, vocabulary_size: 100}",
        "{comms_logger: {enabled: true}, flops_profiler: {profile_step: 3}, data_types: {grad_accum_dtype: fp32}}",
        "{tensorboard: {enabled: false}, csv_monitor: {}, timers: {throughput: {enabled: false}}, log_level: info}",
    ],
)
def test_what_deepspeed_takes_is_taken(text: str) -> None:
    check_engine(recipe(deepspeed=recipe_yaml.load(text)), 1)


def test_5e8_of_a_recipe_reaches_deepspeed_as_a_whole_number() -> None:
    given = recipe_yaml.load("zero_optimization: {reduce_bucket_size: 5e8}")
    size = deepspeed_config(recipe(deepspeed=given), 1, cpu=True)["zero_optimization"]["reduce_bucket_size"]
    assert (size, type(size)) == (500_000_000, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{method: cagrad, options: {c: x}}", "gradient method cagrad: "),
        ("{method: cagrad, options: {c: .nan}}", "gradient.options {'c': nan} cannot weigh 2 tasks"),
        ("{method: upgrad, options: {pref_vector: [1]}}", "gradient.options {'pref_vector': [1]} cannot weigh 2 tasks"),
        ("{method: mgda, options: {max_iters: 0.5}}", "gradient.options {'max_iters': 0.5} cannot weigh 2 tasks"),
        ("{method: pcgrad, options: {c: 1}}", "unknown option of pcgrad 'c'. There is none."),
    ],
)
def test_options_of_gradient_methods_are_tried_before_training(text: str, message: str) -> None:
    pytest.importorskip("torchjd")
    tasks = dict.fromkeys("ab", {"type": "binary", "data": {}})
    with pytest.raises(UserError) as error:
        check_engine(parse_recipe({"tasks": tasks, "gradient": recipe_yaml.load(text)}, "test"), 1)
    assert message in str(error.value)


def test_an_option_in_scientific_notation_is_a_number() -> None:
    pytest.importorskip("torchjd")
    check_engine(recipe(gradient=recipe_yaml.load("{method: cagrad, options: {c: 4e-1}}")), 1)
