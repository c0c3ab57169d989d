"""Values that a recipe inherits from the one it extends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmtl.config import load_recipe
from fastmtl.errors import UserError
from fastmtl.recipes.files import TABLE, bundled_recipes, merge, recipes_root

BASE = """
description: base
tasks:
  a: {type: binary, data: {train: a.csv}, head: {dropout: 0.3}}
  b: {type: regression, range: [0, 5], data: {train: b.csv}}
optimizer: {lr: 0.5, betas: [0.1, 0.2]}
"""


def write(folder: Path, **recipes: str) -> str:
    """Write NAME.yaml for each name and return the last path."""
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{list(recipes)[-1]}.yaml")


def test_sections_are_merged_key_by_key(tmp_path: Path) -> None:
    top = "extends: base.yaml\ntasks: {a: {head: {name: mlp}}}\noptimizer: {betas: [0.3, 0.4]}\n"
    recipe = load_recipe(write(tmp_path, base=BASE, top=top), ["optimizer.head_lr=0.25"])
    assert recipe.task_names == ["a", "b"]
    assert (recipe.tasks["a"].head.name, recipe.tasks["a"].head.dropout) == ("mlp", 0.3)
    assert recipe.optimizer.betas == (0.3, 0.4)
    assert (recipe.optimizer.lr, recipe.optimizer.head_lr) == (0.5, 0.25)
    assert recipe.description == "base"


def test_null_takes_away_and_new_tasks_come_last(tmp_path: Path) -> None:
    top = "extends: base.yaml\ntasks: {a: null, c: {type: binary, data: {train: c.csv}}}\noptimizer: {lr: null}\n"
    recipe = load_recipe(write(tmp_path, base=BASE, top=top))
    assert recipe.task_names == ["b", "c"]
    assert recipe.optimizer.lr == 1e-4  # the default


def test_null_in_an_override_takes_away_too(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE)
    recipe = load_recipe(path, ["tasks.a=null", "optimizer.lr=null", "encoder.max_length=null"])
    assert recipe.task_names == ["b"]
    assert recipe.optimizer.lr == 1e-4 and recipe.encoder.max_length is None
    with pytest.raises(UserError, match=r"tasks\.aa: "):
        load_recipe(path, ["tasks.aa=null"])


def test_chains_and_folders(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, base=BASE)
    write(tmp_path / "inner", middle="extends: ../base.yaml\nseed: 5\n")
    recipe = load_recipe(write(tmp_path, top="extends: inner/middle.yaml\ntrain: {epochs: 4}\n"))
    assert (recipe.seed, recipe.train.epochs, recipe.optimizer.lr) == (5, 4, 0.5)


def test_bundled_names(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, top="extends: demo\nseed: 9\n"))
    assert recipe.seed == 9
    assert recipe.tasks == load_recipe("demo").tasks


def test_merge_follows_the_standard_and_changes_nothing() -> None:
    """Cases of the appendix of RFC 7396."""
    cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ]
    for below, above, expected in cases:
        before = repr((below, above))
        assert merge(below, above) == expected
        assert repr((below, above)) == before


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("extends: dmo\n", "extends: unknown recipe 'dmo'. Did you mean 'demo'?"),
        ("extends: papers/pal-lora/sst_ful\n", "Did you mean 'papers/pal-lora/sst_full'?"),
        ("extends: absent.yaml\n", "no recipe file"),
        ("extends: top.yaml\n", "extends this recipe itself"),
        ("extends: [demo, cs224n]\n", "expected the name or file of one recipe"),
        ("extends: demo\ntasks: {sentiment: {poling: cls}}\n", "Did you mean 'tasks.sentiment.pooling'?"),
    ],
)
def test_mistakes_name_the_file(top: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, top=top)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert path in str(caught.value)


def test_a_circle_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, one="extends: two.yaml\n", two="extends: one.yaml\n")
    with pytest.raises(UserError, match="extends this recipe itself"):
        load_recipe(path)


def test_tables_are_no_recipes() -> None:
    assert list(recipes_root().rglob(TABLE))
    assert not [name for name in bundled_recipes() if name.endswith("table")]
