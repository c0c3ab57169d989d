"""Comparison of saved results, and figures of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fastmtl import cli
from fastmtl.bench import compare, ops, sizes, step
from fastmtl.bench.plot import plot
from fastmtl.errors import UserError
from fastmtl.measure.harness import summary

ORIGIN = {
    "device": "A CPU",
    "driver": None,
    "threads": 2,
    "torch": "2.13",
    "fastmtl": "0.1",
    "commit": "abc",
    "clean": True,
}


def result(*seconds: float, **more: Any) -> dict[str, Any]:
    entry = summary(seconds)
    return {
        "benchmark": "step",
        "environment": dict(ORIGIN),
        "shape": {"name": "minilm"},
        "precision": "fp32",
        "steps": {"fastmtl sum": entry, "transformers": summary([3.0, 3.1, 3.2])},
        **more,
    }


@pytest.mark.parametrize(
    ("new", "verdict"),
    [((1.5, 1.6, 1.7), "slower"), ((0.5, 0.6, 0.7), "faster"), ((1.1, 1.3, 2.0), ""), ((0.9, 1.0, 1.1), "")],
)
def test_slower_is_what_noise_does_not_explain(new: tuple[float, ...], verdict: str) -> None:
    found = {change.name: change for change in compare.changes(result(1.0, 1.1, 1.2), result(*new))}
    change = found["fastmtl sum"]
    assert change.ratio == pytest.approx(new[1] / 1.1) and change.verdict == verdict
    assert change.noise == pytest.approx(0.2 / 1.1 + (new[2] - new[0]) / new[1])
    assert found["transformers"].ratio == 1 and found["transformers"].verdict == ""


def test_all_kinds_of_results_are_compared() -> None:
    entry = summary([1.0, 2.0])
    passes = {"forward": {"eager": entry}, "both": {"eager": entry}}
    named = dict(compare.times({"operations": {"pool": {"passes": passes, "gemm": 1}}}))
    assert list(named) == ["pool, forward, eager", "pool, both, eager"]
    points = [{"tasks": 2, "tokens": 9, "sum": entry}, {"tasks": 4, "tokens": 9, "sum": entry}]
    assert [name for name, _ in compare.times({"points": points})] == ["2, sum", "4, sum"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "bf16"}, "precision fp32, this one bf16"),
        ({"shape": {"name": "bert-base"}}, "shape minilm, this one bert-base"),
        ({"environment": {**ORIGIN, "device": "A GPU"}}, "device A CPU, this one A GPU"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"--compare: the old result has {says}: their times cannot be compared"):
        compare.changes(result(1.0), result(1.0, **change))


def test_files_that_are_no_results(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    with pytest.raises(UserError, match="cannot read .*old.json: No such file"):
        compare.read(file)
    for text, says in (
        ("{", "is not JSON"),
        ("[]", "is not the result of a benchmark"),
        ("{}", "is not the result of a benchmark"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            compare.read(file)


@pytest.mark.parametrize("key", ["device", "driver", "torch", "fastmtl", "commit", "clean"])
def test_no_figure_without_its_origin(key: str, tmp_path: Path) -> None:
    found = result(1.0, 2.0)
    del found["environment"][key]
    with pytest.raises(
        UserError, match=f"no figure can be drawn: the result does not name its {key}: measure it again"
    ):
        plot(found, tmp_path)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="no figure"):
        cli.app(["bench", "plot", str(file), str(tmp_path)], standalone_mode=False)
    assert not list(tmp_path.glob("*.svg"))


def test_a_figure_names_its_origin_and_is_the_same_again(tmp_path: Path) -> None:
    (path,) = plot(result(1.0, 2.0), tmp_path / "new" / "plots")
    drawn = path.read_text()
    assert path.name == "step-minilm.svg" and len(drawn) < 60_000
    assert "A CPU, 2 threads, torch 2.13, fastmtl abc" in drawn and "fastmtl sum" in drawn
    (again,) = plot(result(1.0, 2.0), tmp_path / "again")
    assert again.read_text() == drawn
    dirty = copy.deepcopy(result(1.0))
    dirty["environment"]["clean"] = False
    assert "with changes" in plot(dirty, tmp_path)[0].read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--plot: cannot write to .*file"):
        plot(result(1.0), tmp_path / "file")


def test_the_command_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sizes.SHAPES, "minilm", ops.TINY)
    monkeypatch.setenv("COLUMNS", "160")
    new, old = result(2.0, 2.1, 2.2), result(1.0, 1.1, 1.2)
    old["environment"]["torch"] = "2.12"
    new["rounds"] = 3
    new.update(tasks=3, tokens=1, padded_tokens=2, dropout=0.1)
    old.update(tasks=3, tokens=1, dropout=0.1)
    for entry in new["steps"].values():
        entry.update(ratio_to_transformers=1.0, ratio_to_products=1.0)
        calls = {"operators": 3, "without_optimizer": 2, "outermost": 1}
        entry.update(operator_calls=calls, calls_to_transformers=dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(step, "bench_step", lambda *_, **__: new)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    cli.app(["bench", "step", "--compare", str(file)], standalone_mode=False)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "slower" in line)
    assert line.split() == ["fastmtl", "sum", "1100.000", "2100.000", "1.91x", "±28%", "slower"]
    assert "torch: 2.12 before, 2.13 now" in printed
    assert cli.app(["bench", "step", "--compare", str(file), "--fail-slower"], standalone_mode=False) == 1
