"""report.html: self-contained, complete, and equal when it is rebuilt from a run's files."""

from __future__ import annotations

import itertools
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
from fastmtl.report.predictions import fold
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
    "sst": scored(np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 2]), ids=["a", "b", "c</td>", "d"]),
    "para": scored(np.array([0.9, 0.2, 0.7]), np.array([1.0, 0.0, 0.0])),
    "sts": scored(np.array([0.5, 2.0, 4.5, 3.0]), np.array([0.0, 2.5, 5.0, 2.0])),
}
HOSTILE = "<script>x</script>\n\u202e\x00 & " + "long " * 100
SCORED["sst"].rows.texts[2] = HOSTILE
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


def test_metrics_of_each_class_and_the_worst_rows_are_there(built: Path) -> None:
    """The class fair is right once of two times, good once of two rows; row c is wrong."""
    results = json.loads((built / "results.json").read_text())
    assert results["per_label"]["sst"]["rows"] == [
        ["bad", "1.000", "1.000", "1.000", "1"],
        ["fair", "0.500", "1.000", "0.667", "1"],
        ["good", "1.000", "0.500", "0.667", "2"],
    ]
    assert [row[0] for row in results["errors"]["sts"]["rows"]] == ["3", "0", "1", "2"]
    assert results["errors"]["sts"]["head"] == ["row", "text", "label", "predicted"]
    assert results["errors"]["para"]["rows"] == [["2", "text 2", "0", "1", "0.700"]]
    ((row_id, text, *values),) = results["errors"]["sst"]["rows"]
    assert (row_id, *values) == ("c</td>", "good", "fair", "1.000")
    assert text.startswith("<script>x</script> \\u202e\\x00 & long") and text.endswith("...") and len(text) < 300
    page = Page((built / "report.html").read_text())
    assert {row_id, text, "sst: metrics by class", "sts: largest errors"} <= set(page.text)


def test_many_classes_tasks_and_metrics(tmp_path: Path) -> None:
    """Rare classes are summed, a long table is folded, cosines of many pairs are a table."""
    names = [f"tag {label}" for label in range(40)]
    counts = np.random.default_rng(0).integers(0, 9, (40, 40))
    counts[7] += 100
    shown, folded = fold(names, counts.tolist())
    assert len(shown) == len(folded) == 16 and shown[-1] == "25 others" and "tag 7" in shown
    assert np.sum(folded) == counts.sum() and folded[shown.index("tag 7")][shown.index("tag 7")] == counts[7, 7]
    kinds = {"classification": 3, "binary": 3, "regression": 2}
    tasks: dict[str, Any] = {f"{kind} {n}": {"type": kind, "data": {}} for kind, k in kinds.items() for n in range(k)}
    for name in tasks:
        tasks[name] |= {"c": {"num_labels": 40}, "r": {"range": [0, 1]}}.get(name[0], {})
    recipe = Recipe.model_validate({"tasks": tasks})
    labels = np.arange(80) % 40
    found = scored(np.eye(40)[labels[::-1]], labels)
    results = collect_results(recipe, {"classification 0": found}, {}, steps=1, seconds=1.0, world_size=1)
    results["dev"]["binary 0"] = {"accuracy": 0.5, **{f"metric_{n}": 0.25 for n in range(6)}}
    pairs = {f"{one}/{other}": -0.5 for one, other in itertools.combinations(tasks, 2)}
    line = step_line(1, loss={}, cosines=pairs, task_norms={})
    (tmp_path / "config.yaml").write_text(recipe.dump())
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    text = write_report(tmp_path, results).read_text()
    page = Page(text)
    assert {"25 others", "other metrics", "classification 0: metrics by class (40 rows)"} <= set(page.text)
    assert "metric 0 0.250, metric 1 0.250" in " ".join(page.text)
    assert page.text.count("-0.50") == 2 * len(pairs)
    assert len(results["errors"]["classification 0"]["rows"]) == 10
    for key in ("names", "per_label", "errors"):  # files of older versions
        del results[key]
    (tmp_path / "metrics.jsonl").write_text("")
    assert "largest errors" not in write_report(tmp_path, results).read_text()


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
