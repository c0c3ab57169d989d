"""report.html: self-contained, complete, and equal when it is rebuilt from a run's files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored import scored

import fastmtl
from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.pages.plots import BINS, curves
from fastmtl.report import write_report
from fastmtl.training.results import collect_results

RECIPE = Recipe.model_validate(
    {
        "description": "three <tasks> & more",
        "tasks": {
            "sst": {"type": "classification", "label_names": ["bad", "fair", "good"], "data": {}},
            "para": {"type": "binary", "data": {}},
            "sts": {"type": "regression", "range": [0, 5], "data": {}},
        },
        "gradient": {"method": "pcgrad"},
    }
)
SCORED = {
    "sst": scored(np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 2])),
    "para": scored(np.array([0.9, 0.2, 0.7]), np.array([1.0, 0.0, 0.0])),
    "sts": scored(np.array([0.5, 2.0, 4.5, 3.0]), np.array([0.0, 2.5, 5.0, 2.0])),
}
LABELS = {"0": 1092, "1": 2218, "2": 5234}
DATA = {"sst": {"train": {"rows": 8544, "skipped": 2, "truncated": 7, "labels": LABELS}}}


def step_line(step: int, **changes: Any) -> dict:
    line = {
        "step": step,
        "epoch": 0,
        "loss": {"sst": 1.5 / step, "para": 0.7, "sts": 2.0},
        "lr": {"encoder": 1e-4, "heads": 1e-3},
        "cosines": {"sst/para": 0.1, "sst/sts": -0.2, "para/sts": 0.3},
        "conflict_rate": 1 / 3,
        "task_norms": {"sst": 1.0, "para": 2.0, "sts": 3.0},
        "merged_norm": 2.5,
        "skipped": "task sts" if step == 2 else None,
        "surgery_bytes": 3 << 20,
        "surgery_seconds": 0.004,
        "tokens_per_second": 2000.0,
        "time": 1.0,
    }
    return {**line, **changes}


def save_run(output: Path, lines: list[dict]) -> dict:
    output.mkdir(exist_ok=True)
    (output / "config.yaml").write_text(RECIPE.dump())
    dev = {"sst": {"accuracy": 0.5, "macro_f1": 0.4}, "para": {"accuracy": 0.6}, "sts": {"pearson": 0.7}}
    evaluation = {"step": len(lines), "epoch": 0, "dev": dev, "mean": 0.6}
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, evaluation]))
    return collect_results(RECIPE, SCORED, DATA, steps=len(lines), seconds=3725.0, world_size=2)


class Page(HTMLParser):
    """A parser that checks that tags are closed in order, and collects text, attributes and ids."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.extend((tag, name, value) for name, value in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.extend((tag, name, value) for name, value in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "my run"
    write_report(output, save_run(output, [step_line(step) for step in range(1, 41)]))
    return output


def test_the_page_is_well_formed_and_has_no_outside_asset(built: Path) -> None:
    page = Page((built / "report.html").read_text())
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert (value or "").startswith("#"), f"<{tag} {name}={value}>"
    style = "".join(page.text)
    assert "@import" not in style
    assert re.search(r"url\((?!#)", (built / "report.html").read_text()) is None
    assert not any(tag == "script" for tag, _, _ in page.attributes)


def test_ids_are_unique_and_references_exist(built: Path) -> None:
    text = (built / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    assert references
    assert references <= set(ids)


def test_every_part_is_there(built: Path) -> None:
    text = (built / "report.html").read_text()
    page = Page(text)
    plots = {value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"}
    assert plots == {
        *(f"loss of {task}" for task in RECIPE.task_names),
        "dev metrics",
        *(f"dev metrics of {task}" for task in RECIPE.task_names),
        "predictions of sts",
        "cosines",
        "conflict rate",
        "gradient norms",
        "throughput",
        "learning rate",
    }
    for expected in ("my run", "pcgrad", "1 h 2 min", "8,544", "sst: confusion matrix", "para: confusion matrix"):
        assert expected in page.text
    assert any("(task sts 1)" in part for part in page.text)  # of the skipped steps
    assert any(part.startswith("Scores of the kept model, mean 0.") for part in page.text)
    assert "three &lt;tasks&gt; &amp; more" in text
    assert "torch" in page.text  # versions
    assert len(re.findall("<table", text)) == len(re.findall("<caption>", text))


def test_confusion_matrix_holds_the_counts(built: Path) -> None:
    text = (built / "report.html").read_text()
    table = re.search(r"<caption>sst: confusion matrix.*?</table>", text, re.DOTALL)
    assert table is not None
    assert re.findall(r">(\d+)<small>", table[0]) == ["1", "0", "0", "0", "1", "0", "0", "1", "1"]
    assert re.findall(r'scope="row">(\w+)<', table[0]) == ["bad", "fair", "good"]


def test_shares_of_the_labels_are_told(built: Path) -> None:
    assert "12.8%" in (built / "report.html").read_text()  # 1092 of 8544


def test_no_placeholder_colour_is_left(built: Path) -> None:
    text = (built / "report.html").read_text()
    assert "#0102" not in text
    used = set(re.findall(r"var\(--([\w]+)\)", text))
    assert used <= set(re.findall(r"--([\w]+):", text))


def test_it_is_built_again_from_what_the_run_left(built: Path) -> None:
    before = (built / "report.html").read_bytes()
    (built / "report.html").unlink()
    assert write_report(built).read_bytes() == before


def test_without_results_the_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        write_report(tmp_path)


def test_a_plain_sum_without_cosines_and_a_diverged_loss(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"cosines": {}, "conflict_rate": None, "task_norms": {}, "lr": 1e-4, "skipped": None}
    lines = [step_line(step, **nothing) for step in range(1, 6)]
    lines[3]["loss"]["sst"] = None
    output = tmp_path / "sum"
    text = write_report(output, save_run(output, lines)).read_text()
    assert "Do the tasks agree?" not in text
    assert 'aria-label="loss of sst"' in text


@pytest.mark.slow
def test_a_long_run_stays_small(tmp_path: Path) -> None:
    output = tmp_path / "long"
    rng = np.random.default_rng(0)
    lines = [step_line(step, loss={t: float(rng.random()) for t in RECIPE.task_names}) for step in range(1, 5001)]
    size = write_report(output, save_run(output, lines)).stat().st_size
    assert size < 600_000


def test_results_sample_the_scatter_and_name_the_versions() -> None:
    rng = np.random.default_rng(0)
    some = {"sts": scored(rng.random(9000), rng.random(9000))}
    results = collect_results(RECIPE, some, {}, steps=1, seconds=1.0, world_size=1)
    points = results["scatter"]["sts"]
    assert len(points["labels"]) == len(points["scores"]) == 800
    assert {"python", "torch", "numpy"} <= set(results["versions"])
    assert results["versions"]["fastmtl"] == fastmtl.__version__  # whatever the distribution is called
    assert results["mean"] == results["dev"]["sts"]["pearson"]
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize("points", [1, 2, BINS, BINS + 1, 2 * BINS + 7])
def test_curves_of_any_length_with_gaps(points: int) -> None:
    values = [None if step % 7 == 3 else math.sin(step) for step in range(points)]
    svg = curves({"a": (list(range(points)), values)}, name="x", ylabel="y")
    assert svg.startswith("<svg")
    assert "nan" not in svg.lower()
