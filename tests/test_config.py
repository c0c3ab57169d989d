"""Recipes: the dump equals the input, and every mistake is reported with its key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastmtl.config import Recipe, load_recipe, parse_recipe
from fastmtl.engine.recipe_changes import changes_since
from fastmtl.errors import UserError, unknown_name
from fastmtl.recipes.files import bundled_recipes

TASKS = {"sst": {"type": "classification", "num_labels": 5, "data": {"train": "a.csv"}}}


def save(tmp_path: Path, values: object) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_are_valid_and_repeatable(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    path = tmp_path / "config.yaml"
    path.write_text(recipe.dump())
    again = load_recipe(str(path))
    assert again == recipe
    assert again.dump() == recipe.dump()


def test_the_recipes_of_the_readme_are_bundled() -> None:
    assert {"demo", "cs224n"} <= set(bundled_recipes())
    assert load_recipe("demo").task_names == ["sentiment", "paraphrase", "similarity"]


def test_overrides_are_yaml_and_reach_nested_and_absent_sections(tmp_path: Path) -> None:
    overrides = [
        "optimizer.lr=1e-5",
        "sampler.batch_size={sst: 4}",
        "tasks.sst.head.name=mlp",
        "adapter.layers=[0, 2]",
        "encoder.freeze=true",
        "encoder.max_length=null",
        "deepspeed.zero_optimization.reduce_bucket_size=500",
        "description=a = b",
    ]
    recipe = load_recipe(save(tmp_path, {"tasks": TASKS}), overrides)
    assert recipe.optimizer.lr == 1e-5
    assert recipe.sampler.batch_size == {"sst": 4}
    assert recipe.tasks["sst"].head.name == "mlp"
    assert recipe.adapter.layers == [0, 2]
    assert recipe.encoder.freeze is True
    assert recipe.encoder.max_length is None
    assert recipe.deepspeed == {"zero_optimization": {"reduce_bucket_size": 500}}
    assert recipe.description == "a = b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": TASKS, "optimiser": {}}, "unknown key 'optimiser'. Did you mean 'optimizer'?"),
        ({"tasks": TASKS, "train": {"epoch": 1}}, "unknown key 'train.epoch'. Did you mean 'train.epochs'?"),
        (
            {"tasks": {"sst": {**TASKS["sst"], "poling": "cls"}}},
            "unknown key 'tasks.sst.poling'. Did you mean 'tasks.sst.pooling'?",
        ),
        (
            {"tasks": {"sst": {**TASKS["sst"], "data": {"trian": "a"}}}},
            "unknown key 'tasks.sst.data.trian'. Did you mean 'tasks.sst.data.train'?",
        ),
        ({}, "tasks is missing"),
        ({"tasks": {"a": {"type": "binary"}}}, "tasks.a.data is missing"),
        ({"tasks": {}}, "tasks: "),
        ({"tasks": TASKS, "engine": {"zero": 5}}, "engine.zero: "),
        ({"tasks": TASKS, "train": {"epochs": 0}}, "train.epochs: "),
        ({"tasks": TASKS, "encoder": {"checkpointing": True}}, "encoder: checkpointing is now recompute: none, cheap"),
        ({"tasks": TASKS, "encoder": {"cuda_graphs": True}}, "encoder: cuda_graphs is now a setting of the section"),
        ({"tasks": TASKS, "encoder": {"recompute": "yes"}}, "encoder.recompute: Input should be 'none', 'cheap' or"),
        ({"tasks": {"a": {"type": "regression", "data": {}}}}, "a regression task needs range"),
        ({"tasks": {"a": {"type": "classification", "data": {}}}}, "needs num_labels"),
        (
            {"tasks": {"a": {"type": "classification", "num_labels": 3, "label_names": ["x", "y"], "data": {}}}},
            "label_names has 2 names, num_labels says 3",
        ),
        ({"tasks": {"sst": {**TASKS["sst"], "loss": 5}}}, "tasks.sst.loss: give one name, a list of names, or names"),
        ({"tasks": {"sst": {**TASKS["sst"], "loss": {"mse": "x"}}}}, "names with weights as {bce: 1.0, mnr: 0.5}"),
        ({"tasks": {"sst": {**TASKS["sst"], "loss": {}}}}, "loss: name at least one, each with a weight above 0"),
        ({"tasks": {"sst": {**TASKS["sst"], "loss": {"mse": 0}}}}, "each with a weight above 0"),
        ({"tasks": {"sst": {**TASKS["sst"], "loss": ["mse", "mse"]}}}, "name each once; {mse: 2.0} gives it a weight"),
        ("- a\n- b\n", "a recipe is a mapping of sections, got list"),
        ("a: [1\n", "not a YAML file"),
        ("", "got NoneType"),
    ],
)
def test_mistakes_name_file_and_key(values: object, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, values)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert path in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = save(tmp_path, {"tasks": TASKS, "sede": 1, "train": {"epochs": 0}})
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert "'seed'" in str(caught.value)
    assert "train.epochs" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("seed.x=3", "seed is a value, not a section"),
        ("train.epochs=[", "the value is not YAML"),
        ("train.epochs=many", "train.epochs: "),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(save(tmp_path, {"tasks": TASKS, "seed": 1}), [override])
    assert message in str(caught.value)


def test_missing_files_and_names() -> None:
    with pytest.raises(UserError, match="no recipe file absent.yaml"):
        load_recipe("absent.yaml")
    with pytest.raises(UserError, match="Did you mean 'cs224n'"):
        load_recipe("cs225n")
    assert "Valid: a, b" in str(unknown_name("x", "zzz", ["b", "a"]))
    assert "Did you mean" not in str(unknown_name("x", "zzz", ["b", "a"]))


def test_defaults_by_type() -> None:
    tasks = {
        "c": {"type": "classification", "label_names": ["x", "y", "z"], "data": {}},
        "b": {"type": "binary", "data": {}},
        "r": {"type": "regression", "range": [0, 1], "data": {}},
    }
    recipe = parse_recipe({"tasks": tasks}, "here")
    assert recipe.tasks["c"].num_labels == 3
    assert [task.loss_name for task in recipe.tasks.values()] == ["cross_entropy", "bce", "mse"]
    assert [task.metric_name for task in recipe.tasks.values()] == ["accuracy", "accuracy", "pearson"]
    assert Recipe.model_validate(yaml.safe_load(recipe.dump())) == recipe


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ("", "bfloat16"),
        ("engine.accumulation=2", "float32"),
        ("engine.precision=fp16", "float32"),
        ("engine.zero=3", "float32"),
        ("engine.offload=true", "float32"),
        ("gradient.storage=replay", "float32"),
        ("gradient.storage=kept", "float32"),
        ("gradient.scope=tensor", "float32"),
        ("gradient.method=sum", "float32"),
        ("gradient.dtype=bfloat16 engine.precision=fp32", "bfloat16"),
        ("gradient.dtype=float32", "float32"),
    ],
)
def test_the_dtype_of_task_gradients_follows_the_precision(overrides: str, dtype: str, tmp_path: Path) -> None:
    """Checkpoints are compared by it, however it was written."""
    path = save(tmp_path, {"tasks": TASKS, "gradient": {"method": "pcgrad"}, "engine": {"precision": "bf16"}})
    recipe = load_recipe(path, overrides.split())
    assert recipe.jacobian_dtype == dtype
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    for written in (dtype, other):
        saved = {**recipe.model_dump(), "gradient": {**recipe.gradient.model_dump(), "dtype": written}}
        changes = changes_since(saved, recipe, "here")
        assert changes == ({} if written == dtype else {"gradient.dtype": (other, dtype)})
    phases = load_recipe(path, [*overrides.split(), "phases=[{accumulation: 4}, {}]"])
    assert changes_since(phases.model_dump(), phases, "here") == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.betas=[1.5, 2]", "optimizer.betas.0: Input should be less than 1 (got 1.5)"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas.0: Input should be greater than or equal to 0"),
        ("seed=100000000000000000000", "seed: Input should be less than"),
        ("seed=2020-01-01", "seed: Input should be a valid integer (got datetime.date(2020, 1, 1))"),
        ("train.epochs=1000000000000", "train.epochs: Input should be less than or equal to 1000000 (got"),
        ("train.epochs=1000000001", "train.epochs: Input should be less than or equal to 1000000"),
        ("sampler.batch_size=1e20", "sampler.batch_size: Input should be less than or equal to 2147483647"),
        ("engine.accumulation=99999999999", "engine.accumulation: Input should be less than or equal to 2147483647"),
        ("sampler.steps_per_epoch=1e12", "sampler.steps_per_epoch: Input should be less than or equal to 2147483647"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
        ("engine.clip=.nan", "engine.clip: Input should be"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(save(tmp_path, {"tasks": TASKS}), [override])
    assert message in str(caught.value)


def test_the_largest_seed_is_one_for_torch_and_the_gradient_methods(tmp_path: Path) -> None:
    import torch

    from fastmtl.surgery.methods.order import draw_order

    seed = load_recipe(save(tmp_path, {"tasks": TASKS}), [f"seed={2**62}"]).seed
    torch.manual_seed(seed + 100 * 10_000 + 1 + 4096)  # seeds of phases and ranks
    assert draw_order(3, seed, 5).shape == (3, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["early_stopping.patience=2"], "early_stopping.patience: 2, but no task has a dev file"),
        (["early_stopping.metric=sst/accuracy"], "early_stopping.metric: sst/accuracy: task sst has no dev file"),
        (
            [
                "early_stopping.metric=sst/accuracy",
                "early_stopping.patience=2",
                "tasks.other={type: binary, data: {dev: b}}",
            ],
            "task sst has no dev file",
        ),
    ],
)
def test_early_stopping_needs_the_dev_file_that_it_stops_by(overrides: list[str], message: str, tmp_path: Path) -> None:
    from fastmtl.training.phases import phases_of

    with pytest.raises(UserError) as caught:
        phases_of(load_recipe(save(tmp_path, {"tasks": TASKS}), overrides))
    assert message in str(caught.value)
    phases_of(load_recipe(save(tmp_path, {"tasks": TASKS}), [*overrides, "tasks.sst.data.dev=b.csv"]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "has '/'"),
        ("../up", "has '/'"),
        ("<b>x</b>", "has '<'"),
        ("a\\b", "has"),
        ("a\nb", "has"),
        ("..", "begins with a dot"),
        ("", "empty"),
        (" a", "a space"),
        ("x" * 300, "longer than 200 bytes"),
        ("\u2603" * 70, "longer than 200 bytes"),
    ],
)
def test_names_that_cannot_be_files_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"tasks: the name .*{reason}"):
        parse_recipe({"tasks": {name: {"type": "binary", "data": {}}}}, "test")


def test_names_of_any_language_are_taken() -> None:
    parse_recipe({"tasks": {"na\u00efve \u2603": {"type": "binary", "data": {}}}}, "test")


def test_an_override_changes_one_place_of_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("tasks:\n  one: &same {type: binary, data: {train: x.csv}}\n  two: *same\n")
    recipe = load_recipe(str(path), ["tasks.one.weight=2.0"])
    assert (recipe.tasks["one"].weight, recipe.tasks["two"].weight) == (2.0, 1.0)
