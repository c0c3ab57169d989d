"""YAML of recipes: numbers as people write them, and no duplicate keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmtl.config import TaskConfig, load_recipe
from fastmtl.errors import UserError
from fastmtl.recipes import yaml_reader as recipe_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e8", 5e8),
        ("4e-1", 0.4),
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x1f", 31),
        ("1_0", "1_0"),
        ("1_0.5", "1_0.5"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("e8", "e8"),
    ],
)
def test_numbers(text: str, value: Any) -> None:
    found = recipe_yaml.load(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", ["5e8", "1_0", "010", "1:30", "true", "~", ".5", 5e8, 1e-5, 3, None, True, ["1.", {}]]
)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert recipe_yaml.load(recipe_yaml.dump({"a": value})) == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {}\ntasks:\n  a: {}\n  a: {}\n", "line 4, column 3: the key 'a' occurs twice, first in line 3"),
        ("train: {}\ntrain: {}\n", "line 2, column 1: the key 'train' occurs twice"),
        ("a: [1, 2\n", "line 2, column 1"),
        ("a: 2020-13-40\n", "month must be in 1..12"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="not a YAML file") as error:
        load_recipe(str(file))
    assert message in str(error.value)


def test_a_key_may_override_a_merged_one() -> None:
    assert recipe_yaml.load("base: &b {a: 1}\nmore: {<<: *b, a: 2}\n")["more"] == {"a": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=1_0", "train.epochs: Input should be a valid integer (got '1_0')"),
        ("train.epochs=true", "train.epochs: Input should be a valid integer (got True)"),
        ("optimizer.lr='1e-4'", "optimizer.lr: Input should be a valid number (got '1e-4')"),
        ("train.epochs=1.5", "train.epochs: Input should be a valid integer (got 1.5)"),
    ],
)
def test_text_and_booleans_are_no_numbers(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo", [override])
    assert message in str(error.value)


def test_numbers_in_a_file_and_on_the_command_line_are_the_same(tmp_path: Path) -> None:
    settings = {
        "deepspeed": "{zero_optimization: {reduce_bucket_size: 5e8}}",
        "gradient.options": "{c: 4e-1}",
        "train.max_steps": "1e3",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "extends: demo\ndeepspeed: {zero_optimization: {reduce_bucket_size: 5e8}}\ngradient: {options: {c: 4e-1}}\n"
        "train: {max_steps: 1e3}\n"
    )
    assert load_recipe(str(file)) == load_recipe("demo", [f"{key}={value}" for key, value in settings.items()])
    recipe = load_recipe(str(file))
    assert recipe.gradient.options == {"c": 0.4} and recipe.train.max_steps == 1000
    assert recipe.deepspeed["zero_optimization"]["reduce_bucket_size"] == 5e8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "binary", "label_names": ["no", "maybe", "yes"]}, "a binary task has two label_names"),
        ({"type": "binary", "label_names": [False, True]}, "put it in quotes"),
        ({"type": "regression", "range": [3, 3]}, "the smallest label 3 has to be below the largest 3"),
        ({"type": "regression", "range": [5, 0]}, "the smallest label 5 has to be below the largest 0"),
        ({"type": "regression", "range": [0, 5], "label_names": ["a", "b"]}, "a regression task has numbers"),
        ({"type": "classification", "label_names": ["a", "b", "a "]}, "'a' and 'a ' are the same label"),
        ({"type": "classification", "label_names": [1, "1.0"]}, "'1' and '1.0' are the same label"),
        ({"type": "classification", "label_names": ["a", " "]}, "a name is empty"),
    ],
)
def test_impossible_labels(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        TaskConfig.model_validate({**values, "data": {}})
    assert message in str(error.value)
