"""`fastmtl profile` as a command, on a recipe of a few thousand weights."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmtl import cli
from fastmtl.errors import UserError
from fastmtl.measure.ranges import NAMES, PREFIX
from fastmtl.profile import plots

GIB = 2**30


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_debug", False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    words = random.Random(0)
    for name in ("one", "two"):
        lines = [f"the cat {' '.join(words.choices(['sat', 'ran', 'ate'], k=9))}\t{row % 2}" for row in range(40)]
        (directory / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")

    def data(name: str) -> dict[str, Any]:
        return {"train": f"{name}.tsv", "columns": {"text": "text", "label": "label"}}

    values = {
        "encoder": {"path": str(tiny_bert)},
        "data": {"dir": str(directory), "cache_dir": str(directory / "cache")},
        "tasks": {name: {"type": "binary", "data": data(name)} for name in ("one", "two")},
        "gradient": {"method": "pcgrad"},
    }
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastmtl", "profile", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@pytest.mark.slow(15)
def test_a_whole_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The advice draws the largest batch that fits: with all memory of this machine it takes 20 s.
    arguments = "--batch-sizes 4 --methods sum,pcgrad --storages stacked,replay --trace --commit 1234567"
    arguments += " --memory-limit 3GiB"
    assert run(monkeypatch, str(recipe), *arguments.split(), "train.epochs=1") == 0
    out = capsys.readouterr().out
    directory = tmp_path / "profiles" / "small"
    result = json.loads((directory / "profile.json").read_text())
    assert {"device", "driver", "torch", "python", "fastmtl", "commit", "clean", "kernels"} <= set(
        result["environment"]
    )
    series = ["sum", "pcgrad stacked", "pcgrad replay"]
    assert [(p["batch_size"], p["series"]) for p in result["points"]] == [(4, one) for one in series]
    for point in result["points"]:
        measured = point["measured"]
        assert point["failed"] is None
        assert sum(measured["parts"].values()) == measured["bytes"] < measured["process_bytes"]
        assert abs(point["error"]) < 0.1
        assert len(measured["seconds"]["samples_s"]) == 5 and measured["tokens_per_s"] > 0
        stacked = point["storage"] == "stacked"
        assert (measured["parts"]["task gradients"] > 20_000) == stacked
    assert [spread["series"] for spread in result["spread"]] == series
    last = {spread["series"]: spread["stages"] for spread in result["spread"]}["pcgrad stacked"]
    assert last["3"]["storage"] == "replay" and last["1"]["bytes"]["8"] < last["1"]["bytes"]["1"]
    for name in ("memory", "throughput", "methods"):
        assert (directory / f"{name}.svg").stat().st_size < 60_000
    assert "PCGrad with `storage: replay`" in out and result["advice"]["text"] in out
    for one in series:
        check_trace(directory / f"trace-{one.replace(' ', '-')}.json.gz", joint=one == "sum")
    assert "where the time goes" in out


def check_trace(file: Path, *, joint: bool) -> None:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    found = {event["name"].removeprefix(PREFIX) for event in events if event.get("name", "").startswith(PREFIX)}
    missing = {"surgery", "communication"} if joint else {"communication"} if "replay" in file.name else set()
    assert found == set(NAMES) - missing


@pytest.mark.slow
@pytest.mark.parametrize("floors", [[], ["--floors", "h200"]])
def test_more_ranks(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    floors: list[str],
) -> None:
    arguments = "--batch-sizes 4 --methods sum,pcgrad --scale-out --link slow --commit 1234567"
    assert run(monkeypatch, str(recipe), *arguments.split(), *floors) == 0
    out = capsys.readouterr().out
    directory = tmp_path / "profiles" / "small"
    result = json.loads((directory / "scale-out.json").read_text())
    assert [entry["series"] for entry in result["series"]] == ["sum", "pcgrad stacked"]
    for entry in result["series"]:
        assert set(entry["parts"]) == {*NAMES, "the rest"} and entry["parts"]["backward"] > 0
        assert entry["source"].startswith("floors, not measured" if floors else "measured, one rank on")
        assert entry["source"] in out
        ways = ["sum"] if entry["series"] == "sum" else ["exact", "local", "sketch"]
        assert list(dict.fromkeys(point["reduce"] for point in entry["points"])) == ways
        seconds = {(p["reduce"], p["tasks"], p["ranks"]): p["seconds"] for p in entry["points"]}
        assert all(seconds[way, 2, 1024] > seconds[way, 2, 2] for way in ways)
    assert (directory / "scale-out.svg").stat().st_size < 100_000 and "scale-out.svg" in out


@pytest.mark.slow
def test_the_largest_batch_survives_running_out_of_memory(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process alone exceeds the limit: nothing fits, and the result so far is saved."""
    arguments = ["--batch-sizes", "4", "--find-max", "--memory-limit", "20MiB", "--output", "out"]
    assert run(monkeypatch, str(recipe), *arguments) == cli.EXIT_USER_ERROR
    shown = capsys.readouterr()
    result = json.loads((tmp_path / "out" / "profile.json").read_text())
    (point,) = result["points"]
    assert point["out_of_memory"] and point["measured"] is None and point["predicted"]["bytes"] > 0
    assert result["largest"][0]["measured"] == 0
    assert "its process was killed" in shown.out
    assert "no point could be measured" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "8,many"], "--batch-sizes: 'many' is no number of rows"),
        (["--batch-sizes", "0"], "--batch-sizes: '0' is no number of rows"),
        (["--batch-sizes", ""], "--batch-sizes: '' is no number of rows"),
        (["--memory-limit", "much"], "--memory-limit: 'much' is no size: write it as 24GiB"),
        (["--methods", "pcgard"], "Did you mean 'pcgrad'?"),
        (["--storages", "keep"], "--storages: unknown value 'keep': use stacked, kept or replay"),
        (["--scale-out", "--link", "nvlnk"], "Did you mean 'nvlink'?"),
        (["--scale-out", "--floors", "h20"], "Did you mean 'h200'?"),
        (["--floors", "h200"], "--link and --floors need --scale-out"),
        (["--link", "slow"], "--link and --floors need --scale-out"),
        (["--scale-out", "--trace"], "--scale-out only predicts"),
        (["--output", "/proc/nowhere"], "--output: cannot write to /proc/nowhere"),
        (["train.epoch=1"], "Did you mean 'train.epochs'?"),
    ],
)
def test_mistakes_are_one_sentence(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, str(recipe), *arguments) == cli.EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("1.5GB", 1_500_000_000), ("512Mi", 512 * 2**20), ("1000", 1000)],
)
def test_sizes(text: str, expected: int) -> None:
    from fastmtl.commands.profile import _bytes

    assert _bytes(text) == expected


ABOUT: dict[str, Any] = {
    "device": "a CPU",
    "driver": None,
    "cuda": None,
    "threads": 2,
    "python": "3.11",
    "torch": "2.13.0",
    "fastmtl": "0.1.0",
    "commit": "1234567",
    "clean": True,
}


@pytest.mark.parametrize("key", ["device", "driver", "torch", "commit", "clean"])
def test_a_figure_without_its_origin_is_refused(key: str, tmp_path: Path) -> None:
    about = {name: value for name, value in ABOUT.items() if name != key}
    with pytest.raises(UserError, match=f"does not name its {key}"):
        plots.draw({"environment": about, "points": []}, tmp_path)
    with pytest.raises(UserError, match="does not name its device"):
        plots.draw({"points": []}, tmp_path)
    assert plots.draw({"environment": ABOUT, "points": []}, tmp_path) == []
