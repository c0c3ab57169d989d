"""The commands as seen by a user: help, errors, exit codes, and arguments of the training loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from launch import children_seconds, python_path

from fastmtl import cli
from fastmtl.errors import TrainingError, UserError
from fastmtl.version import __version__


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_debug", False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the training loop, which has its own tests: record the calls."""
    calls: list[dict[str, Any]] = []

    def train(
        recipe: Any, output: Path, *, resume: bool, accept_changes: bool, local_rank: int | None, rows: Any
    ) -> None:
        given = {"resume": resume, "accept_changes": accept_changes, "local_rank": local_rank, "rows": rows}
        calls.append({"recipe": recipe, "output": output, **given})

    module = types.ModuleType("fastmtl.loop")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastmtl.loop", module)
    return calls


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Return the console script's exit status."""
    monkeypatch.setattr(sys, "argv", ["fastmtl", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    module = types.ModuleType("fastmtl.loop")

    def train(*_: object, **__: Any) -> None:
        raise error

    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastmtl.loop", module)


def test_help_is_instant_and_teaches() -> None:
    code = (
        "import sys; from fastmtl.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "160"}
    before = children_seconds()
    command = [sys.executable, "-c", code, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    elapsed = children_seconds() - before
    assert result.stdout.splitlines()[-1] == "[]"  # slow modules are not imported
    assert elapsed < 2  # 0.3 s
    for name in ("train", "evaluate", "predict", "export", "merge", "recipes", "doctor"):
        assert f" {name} " in result.stdout
    assert "local_rank" not in result.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "export", "merge"])
def test_help_of_a_command_has_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f"fastmtl {command} " in text.split("Examples")[1]


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fastmtl {__version__}\n"


def test_train_hands_over_recipe_output_and_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    output = tmp_path / "a" / "run"
    arguments = ["train", "demo", "train.epochs=7", "optimizer.lr=1e-5", "--output", str(output)]
    assert run(monkeypatch, "--local_rank=1", *arguments) == 0
    (call,) = trained
    assert call["recipe"].train.epochs == 7
    assert call["recipe"].optimizer.lr == 1e-5
    assert (call["output"], call["resume"], call["local_rank"]) == (output, False, 1)
    assert call["rows"].sizes["sentiment", "train"] == 2400  # read once, before torch is imported
    assert output.is_dir()


def test_options_may_stand_between_overrides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    arguments = ["train", "--output", str(tmp_path / "run"), "demo", "seed=3", "--resume", "train.epochs=2"]
    assert run(monkeypatch, *arguments) == 0
    assert (trained[0]["recipe"].seed, trained[0]["recipe"].train.epochs, trained[0]["resume"]) == (3, 2, True)
    assert trained[0]["local_rank"] is None


def test_default_output_is_named_after_the_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", "demo") == 0
    assert trained[0]["output"] == Path("runs/demo")


def test_a_directory_with_a_run_is_refused_without_resume(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    trained: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "--resume" in error
    assert "--output" in error
    assert trained == []
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path), "--resume") == 0


def test_only_the_first_process_looks_at_the_output_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")  # the first process has already started
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, "--local_rank=1", "train", "demo", "--output", str(tmp_path)) == 0
    assert len(trained) == 1


def test_an_output_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    trained: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path / "file" / "run")) == 2
    assert "cannot write to the output directory" in capsys.readouterr().err
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "dmeo"], "unknown recipe 'dmeo'. Did you mean 'demo'?"),
        (["train", "demo", "train.epoch=3"], "Did you mean 'train.epochs'?"),
        (["train", "demo", "epochs"], "'epochs' is not an override"),
        (["train", "no/such.yaml"], "no recipe file no/such.yaml"),
        (["evaluate", "no-such-dir", "--file", "x.csv"], "--file needs --task"),
        (["evaluate", "d", "--task", "a", "--file", "x.csv", "--data", "d"], "exclude each other"),
    ],
)
def test_user_errors_are_one_message_without_a_traceback(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastmtl: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_usage_errors_end_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "trian") == 2
    assert "train" in capsys.readouterr().err
    assert run(monkeypatch, "train", "demo", "--outptu", "x") == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "dmeo"]
    arguments.insert(0 if where == "before" else 2, "--debug")
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "unknown recipe 'dmeo'" in error


def test_under_a_launcher_one_process_tells_a_user_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, UserError("the file is wrong"))
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(monkeypatch, f"--local_rank={rank}", "train", "demo", "--output", str(tmp_path)) == 2
        said.append(capsys.readouterr().err)
    assert said == ["fastmtl: the file is wrong\n", ""]


def test_an_unexpected_error_is_short_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyError("layer"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastmtl (rank 1): KeyError: 'layer'\n")
    assert "--debug" in error
    assert "Traceback" not in error


def test_failures_of_the_machine_are_not_called_bugs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    import torch

    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "checkpoints/5"))
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "checkpoints/5: No space left on device" in error
    assert "bug" not in error
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "sampler.batch_size" in error
    assert "bug" not in error


def test_advice_of_a_run_that_cannot_go_on_stands_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, TrainingError("the gradient of mood was not finite: lower optimizer.lr"))
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path)) == 1
    assert capsys.readouterr().err == "fastmtl: the gradient of mood was not finite: lower optimizer.lr\n"


def test_an_interrupt_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert run(monkeypatch, "train", "demo", "--output", str(tmp_path)) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_recipes_lists_names_and_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "recipes") == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "sentiment, paraphrase, similarity" in text
    assert "fastmtl recipes papers/pal-lora" in text and "sst_pal_lora" not in text


def test_recipes_of_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "recipes", "papers/pal-lora/") == 0
    text = capsys.readouterr().out
    assert "papers/pal-lora/sst_pal_lora" in text and "demo" not in text
    assert run(monkeypatch, "recipes", "papers/pal-lore") == 2
    assert "Did you mean 'papers/pal-lora'?" in capsys.readouterr().err


def test_doctor_json_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastmtl.commands import doctor

    good = doctor.Finding("versions", "torch", "ok", "2", required=True)
    optional = doctor.Finding("packages", "apex", "missing", "not installed")
    monkeypatch.setattr(doctor, "diagnose", lambda: [good, optional])
    assert run(monkeypatch, "doctor", "--json") == 0
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == ["torch", "apex"]
    broken = doctor.Finding("versions", "deepspeed", "broken", "no", required=True)
    monkeypatch.setattr(doctor, "diagnose", lambda: [good, broken])
    assert run(monkeypatch, "doctor") == 1
    assert "deepspeed" in capsys.readouterr().out
