"""Input with control sequences, markup or excessive length, in real commands.

Such text could move the cursor, colour a terminal, fill a screen or be parsed as markup.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fastmtl import cli
from fastmtl.config import parse_recipe
from fastmtl.errors import LINE_CHARACTERS, printable
from fastmtl.pages.plots import curves
from fastmtl.tracking.display import BarDisplay, LineDisplay, scores_table

EVIL = "\x1b[31mevil\nsecond\rline\x07\u202e\u2028" + "x" * 120
RECIPE = "tasks: {mood: {type: binary, data: {train: a.csv, columns: {text: text, label: label}}}}\n"


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command in a folder with a good recipe; return its status and stderr."""
    monkeypatch.setattr(cli, "_debug", False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    Path("a.csv").write_text("text,label\ngood,1\n", encoding="utf-8")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastmtl", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def one_short_line(text: str) -> bool:
    return text.count("\n") == 1 and text.strip("\n").isprintable() and len(text) < LINE_CHARACTERS + 20


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", EVIL],
        ["train", f"{EVIL[:50]}.yaml"],
        ["train", "r.yaml", EVIL],
        ["train", "r.yaml", f"{EVIL}=5"],
        ["train", "r.yaml", f"seed={EVIL}"],
        ["train", "r.yaml", f"seed={json.dumps(EVIL)}"],
        ["train", "r.yaml", f"tasks={{{json.dumps(EVIL)}: {{type: binary, data: {{}}}}}}"],
        ["train", "r.yaml", f"data.dir={json.dumps(EVIL)}"],
        ["train", "r.yaml", "data.dir=.", f"tasks.mood.data.train={json.dumps(EVIL)}"],
        ["train", "r.yaml", "data.dir=.", f"tasks.mood.data.columns.text={json.dumps(EVIL)}"],
        ["train", "r.yaml", "data.dir=.", f"tasks.mood.metric={json.dumps(EVIL)}"],
        ["train", "r.yaml", "data.dir=.", f"sampler.name={json.dumps(EVIL)}"],
        ["train", "r.yaml", "data.dir=.", f"early_stopping.metric={json.dumps(EVIL)}"],
        ["train", "r.yaml", f"phases=[{{name: {json.dumps(EVIL)}, trains: x}}]"],
        ["train", "r.yaml", "--output", f"a.csv/{EVIL[:50]}"],
        ["recipes", EVIL],
        ["sweep", "r.yaml", EVIL[:50]],
        ["sweep", "r.yaml", "r.yaml", "--launcher", f"{EVIL}'"],
        ["reproduce", EVIL],
        ["reproduce", "pal-lora", "--seeds", EVIL],
        ["profile", "r.yaml", "--batch-sizes", EVIL],
        ["merge", "r.yaml", "a", "b", "--rename", EVIL],
        ["export", "a", f"a.csv/{EVIL[:50]}"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1][:12]!r}",
)
def test_an_argument_is_quoted_on_one_line(arguments: list[str], told: Callable[..., tuple[int, str]]) -> None:
    status, error = told(*arguments)
    assert status == 2 and error.startswith("fastmtl: ") and one_short_line(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\n\x1b[2Jgood,\x1b[31m" + "9" * 5000 + "\n"),
        ("a.csv", "\x1b[31mtext" + "x" * 5000 + ",label\ngood,1\n"),
        ("r.yaml", RECIPE + '"\\e[31m evil\\n": 5\n'),
        ("r.yaml", RECIPE + 'seed: "\\e[31m evil\\n ' + "y" * 5000 + '"\n'),
        ("r.yaml", RECIPE + "description: \x1b[31m\n"),
        ("r.yaml", RECIPE.replace("mood", '"\\e[31m"')),
    ],
)
def test_what_files_hold_is_quoted_on_one_line(
    name: str, content: str, told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    status, error = told("train", "r.yaml", "data.dir=.")
    assert status == 2 and one_short_line(error)


@pytest.mark.parametrize("name", ["[/x]", "[red]mood", "$_{$", "_mood", "a $\\frac$"])
def test_no_name_is_read_as_markup_or_as_a_formula(name: str) -> None:
    recipe = parse_recipe({"tasks": {"mood": {"type": "binary", "data": {}}}}, "test")
    named = recipe.model_copy(update={"tasks": {name: recipe.tasks["mood"]}})
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(scores_table(named, {name: {"accuracy": 0.5}}, 0.5, f"{name}.csv"))
    for display in (LineDisplay(console, 1), BarDisplay(console, 1, 0)):
        display.update(1, 0, f"{name} 0.5")
        display.message(f"{name}\n\x1b[31m")
        display.close()
    text = console.export_text()
    assert text.count(name) == 7 and "\\x1b[31m" in text and "\x1b" not in text
    drawn = curves({name: ([1, 2], [0.1, 0.2]), "other": ([1, 2], [0.2, 0.3])}, name="loss", ylabel=name)
    assert drawn.count(f"{name}<") == 2


def test_lines_stay_lines() -> None:
    assert printable("a\nb\x1b") == "a\nb\\x1b"
