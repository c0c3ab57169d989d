"""Every recipe of the reports builds its model and takes two steps per phase on demo rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scripts import run_script

from fastmtl.config import load_recipe
from fastmtl.recipes.files import bundled_recipes
from fastmtl.reproduce.tables import load_results, reports
from fastmtl.training.phases import phases_of

WORKER = Path(__file__).with_name("paper_recipe_cases.py")
PAPERS = [name for name in bundled_recipes() if name.startswith("papers/")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("papers")
    run_script(WORKER, directory, tiny_bert)
    return json.loads((directory / "outcomes.json").read_text(encoding="utf-8"))


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", PAPERS)
def test_two_steps(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["error"] is None, outcome["error"]
    phases = phases_of(load_recipe(name, ["train.max_steps=2"]))
    assert len(outcome["steps"]) == sum(phase.recipe.train.max_steps or 0 for phase in phases)
    losses = [loss for step in outcome["steps"] for loss in step.values()]
    assert losses and all(math.isfinite(loss) for loss in losses)
    trained = {task for phase in phases if phase.objective == "tasks" for task in phase.recipe.tasks}
    assert set(outcome["dev"]) == trained
    assert all(math.isfinite(value) for metrics in outcome["dev"].values() for value in metrics.values())


@pytest.mark.parametrize("report", reports())
def test_every_row_has_a_recipe_or_a_reason(report: str) -> None:
    paper = load_results(report)
    wanted = {f"papers/{report}/{variant.recipe}" for variant in paper.variants().values()}
    assert wanted <= set(PAPERS)
    there = {name for name in PAPERS if name.startswith(f"papers/{report}/")}
    assert there == wanted
    for variant in paper.variants().values():
        settings = [f"{key}={json.dumps(value)}" for key, value in variant.settings.items()]
        load_recipe(f"papers/{report}/{variant.recipe}", settings)
