"""Comparisons of methods: their runs, the search of `tuned`, statistics, and a stop."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fastmtl.config import WeightingConfig, load_recipe
from fastmtl.errors import UserError
from fastmtl.model.losses.weighting import check_weighting
from fastmtl.sweep import search
from fastmtl.sweep.command import run_comparison
from fastmtl.sweep.compare import settings_of
from fastmtl.sweep.compare_lines import half_width
from fastmtl.sweep.runs import FAILED, INTERRUPTED, OK

pytest.importorskip("optuna")
NAMES = get_args(WeightingConfig.model_fields["name"].annotation)
# A program in the place of the launcher: the score depends on the method, the weights and the seed.
TRAINING = """
import json, pathlib, sys
import yaml
place = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
recipe = yaml.safe_load((place / "recipe.yaml").read_text())
method, weighting, seed = recipe["gradient"]["method"], recipe["weighting"]["name"], recipe["seed"]
if method == "gradvac":
    sys.exit("fastmtl: the training diverged")
ratio = recipe["tasks"]["one"]["weight"] / recipe["tasks"]["two"]["weight"]
mean = {"sum": 0.5, "pcgrad": 0.6, "equal": 0.55}[method] + seed / 100 + 0.01 * min(ratio, 4)
mean += (weighting != "fixed") / 10
dev = {name: {"accuracy": mean} for name in ("one", "two")}
results = {"dev": dev, "mean": None if seed == 9 else mean, "steps": 4, "seconds": 10.0 * seed, "memory_mib": 100.0}
if method == "pcgrad":
    lines = [{"step": step, "cosines": {"one/two": cosine}} for step, cosine in enumerate((-0.5, None, 0.5, 0.1, 0.2))]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(place / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(search, "POLL", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    task = {"type": "binary", "data": {"train": "train.tsv", "dev": "dev.tsv"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"tasks": {"one": task, "two": task}}))
    (tmp_path / "training.py").write_text(TRAINING)
    return str(tmp_path / "recipe.yaml")


def compare(tmp_path: Path, recipe: str, methods: list[str], seeds: list[int], tuning: int | None = None) -> Any:
    launcher = [sys.executable, str(tmp_path / "training.py")]
    status = run_comparison(recipe, [], methods, seeds, tuning, tmp_path / "out", launcher)
    return status, json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]


def test_methods_weightings_and_tuned(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = compare(tmp_path, recipe, ["sum", "tuned", "pcgrad", "famo", "gradnorm"], [1, 2], tuning=3)
    assert status == OK and list(found) == ["sum", "tuned", "pcgrad", "famo", "gradnorm"]
    printed = capsys.readouterr().out
    assert re.search(r"method +┃ one accuracy +┃ two accuracy +┃ mean ", printed)  # not in columns of a few letters
    assert found["sum"]["scores"]["mean"] == pytest.approx([0.52, 0.53])
    assert found["pcgrad"]["scores"]["mean"] == pytest.approx([0.62, 0.63])
    assert found["famo"]["scores"]["mean"] == pytest.approx([0.62, 0.63])  # 0.1 for a weighting
    assert found["gradnorm"]["scores"]["one accuracy"] == pytest.approx([0.67, 0.68])
    assert found["pcgrad"]["difference"] == pytest.approx([0.1, 0.0], abs=1e-9) and found["sum"]["difference"] is None
    assert found["pcgrad"]["differences"]["two accuracy"] == pytest.approx([0.1, 0.0], abs=1e-9)
    assert found["pcgrad"]["conflicts"] == {"all": 0.25, "one/two": 0.25} and found["sum"]["conflicts"] == {}
    assert found["sum"]["seconds"] == [10.0, 20.0] and found["sum"]["memory_mib"] == [100.0, 100.0]
    (weights,) = json.loads((tmp_path / "out" / "compare.json").read_text())["weights"]
    ratio = min(weights["one"] / weights["two"], 4)
    assert found["tuned"]["scores"]["mean"] == pytest.approx([0.51 + 0.01 * ratio, 0.52 + 0.01 * ratio])
    assert len(list((tmp_path / "out" / "tuning" / "points").iterdir())) == 3
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| pcgrad | 0.6250 ± 0.0071 |" in table and "+0.1000 ± 0.0000" in table
    assert "best of 3 trials with seed 1 by the same dev rows" in table
    assert (tmp_path / "out" / "compare.svg").read_text().count("pcgrad") == 1
    assert "tuned: weights one" in table and "0.6250 ± 0.0071" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fixed"])
def test_a_weighting_has_a_gradient_method_that_it_works_with(name: str) -> None:
    settings = settings_of(name)
    assert settings["gradient.method"] == ("equal" if name in ("gradnorm", "excess_mtl") else "sum")
    overrides = [f"{key}={value}" for key, value in settings.items()]
    check_weighting(load_recipe("demo", overrides))


def test_a_failed_method_is_counted_and_finished_runs_are_kept(tmp_path: Path, recipe: str) -> None:
    status, found = compare(tmp_path, recipe, ["sum", "gradvac"], [1, 2])
    assert status == FAILED and found["gradvac"]["failed"] == 2 and found["sum"]["failed"] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("points/*/results.json")}
    _, found = compare(tmp_path, recipe, ["sum", "pcgrad"], [1, 2, 9])  # seed 9 has no mean
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [found[method]["failed"] for method in ("sum", "pcgrad")] == [1, 1]
    assert found["pcgrad"]["scores"]["mean"] == pytest.approx([0.62, 0.63])
    assert found["pcgrad"]["difference"] == pytest.approx([0.1, 0.0], abs=1e-9)
    runs = len(list((tmp_path / "out").glob("points/*")))
    with pytest.raises(UserError, match="is a run with train.epochs: 1, now 7"):  # before famo is trained
        run_comparison(recipe, ["train.epochs=7"], ["famo", "sum"], [1], None, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("points/*"))) == runs


def test_a_stop_of_the_search_stops_the_comparison(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.Search, "run", lambda self: ([], INTERRUPTED))
    status, found = compare(tmp_path, recipe, ["sum", "tuned", "pcgrad"], [1])
    assert status == INTERRUPTED and list(found) == ["sum"]
    monkeypatch.setattr(search.Search, "run", lambda self: ([], FAILED))
    status, found = compare(tmp_path, recipe, ["sum", "tuned", "pcgrad"], [1])
    assert status == FAILED and list(found) == ["sum", "pcgrad"]


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        (["pcgard"], [1], "unknown method 'pcgard'. Did you mean 'pcgrad'?"),
        (["sum", "sum"], [1], "--methods: name at least one, and each once"),
        (["sum"], [], "--seeds: name at least one"),
        (["sum:c=1"], [1], "gradient method sum takes no options, got c"),
        (["famo:lr=1"], [1], "--methods famo: options after a colon are for gradient methods"),
        (["pcgrad:seed"], [1], "--methods pcgrad:seed: an option is written KEY=VALUE"),
    ],
)
def test_bad_methods_and_seeds(methods: list[str], seeds: list[int], message: str, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(UserError) as caught:
        run_comparison(recipe, [], methods, seeds, None, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_of_a_method() -> None:
    assert settings_of("gradvac:beta=0.5") == {**settings_of("gradvac"), "gradient.options": {"beta": 0.5}}


def test_a_recipe_without_dev_rows_is_refused(tmp_path: Path, recipe: str) -> None:
    overrides = ["tasks.one.data.dev=null", "tasks.two.data.dev=null"]
    with pytest.raises(UserError, match="compare needs dev rows"):
        run_comparison(recipe, overrides, ["sum"], [1], None, tmp_path / "out")


def test_the_interval_is_students() -> None:
    """The 95 % interval of four numbers: t = 3.182 for three degrees of freedom."""
    assert half_width([1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.1824463 * 1.2909944 / 2)
    assert half_width([1.0]) is None
