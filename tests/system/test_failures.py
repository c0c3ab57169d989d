"""Failures that are reported as a bug in fastmtl: neither input nor the machine can cause them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl import cli
from fastmtl.engine import distributed
from fastmtl.errors import TrainingError, UserError
from fastmtl.files.json_files import read_json
from fastmtl.files.user_path import cache_path, user_path
from fastmtl.inference.predictions import _writing
from fastmtl.system.failures import explained
from fastmtl.system.launcher_variables import is_first, number, world_size
from fastmtl.tracking.metrics_file import read_metrics


def allocate() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TrainingError("the loss is not finite: lower optimizer.lr"), "the loss is not finite: lower optimizer.lr"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of GPU memory: lower sampler.batch_size"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "out of GPU memory: "),
        (MemoryError(), "out of memory: lower sampler.batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\nb"), "a b: No such file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"x"), "x: Is a directory"),
        (OSError("no number"), "no number"),
        (ModuleNotFoundError("No module named 'safetensors'"), "`fastmtl doctor` says what is missing"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "as on a full disk"),
        (RuntimeError("No CUDA GPUs are available"), "the GPU cannot be used: "),
    ],
)
def test_what_input_or_the_machine_can_cause_is_no_bug(error: Exception, message: str) -> None:
    told = explained(error)
    assert told is not None and message in told and told.isprintable()


def test_torch_without_memory_is_no_bug() -> None:
    with pytest.raises(RuntimeError) as caught:
        allocate()
    assert "out of memory: lower" in str(explained(caught.value))


def test_lost_processes_are_no_bug_in_a_shared_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert explained(lost) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the one that ended first says why" in str(explained(lost))
    assert "cannot be reached" in str(explained(torch.distributed.DistNetworkError("port is in use")))


@pytest.mark.parametrize("error", [KeyError("layer"), AssertionError(), RuntimeError("illegal memory access")])
def test_anything_else_is_a_bug(error: Exception) -> None:
    assert explained(error) is None


def test_a_bug_is_told_on_printable_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: Any) -> None:
        raise KeyError("\x1b[2J" + "\n" * 10_000)

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(told) == 2 and all(line.isprintable() for line in told)
    assert "bug in fastmtl" in told[1]


@pytest.mark.parametrize(
    ("variables", "message", "prints"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "the environment variable RANK is 'x'", True),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "the environment variable RANK is '-1'", True),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2", True),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not", True),
        ({"RANK": "0", "WORLD_SIZE": "many"}, "the environment variable WORLD_SIZE is 'many'", True),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0", True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "\x1b"}, "LOCAL_RANK is '\\x1b'", False),
    ],
)
def test_a_launchers_variables_are_numbers(
    variables: dict[str, str], message: str, prints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        distributed.this_process()
    assert message in str(caught.value)
    assert is_first() is prints


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), number("LOCAL_RANK", 3), is_first()) == (1, 3, True)


@pytest.mark.parametrize("port", ["x", "99999"])
def test_a_place_where_processes_cannot_meet_is_named(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match=f"cannot meet at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: "):
        distributed.join(distributed.Ranks(0, 1, 0, torch.device("cpu")))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\x80", '{"a": ' * 100_000])
def test_json_that_was_cut_or_changed_names_the_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"results\.json: "):
        read_json(file)
    file.write_bytes(text.encode("latin-1") + b"\n" + json.dumps({"step": 1}).encode())
    with pytest.raises(UserError, match=r"results\.json, line 1: not a line of metrics"):
        read_metrics(file)


def test_a_path_with_the_character_0_is_refused() -> None:
    for find in (user_path, cache_path):
        with pytest.raises(UserError, match=r"a\\x00b: a path cannot hold the character 0"):
            find("a\0b")


def test_predictions_go_into_devices_and_through_links_and_replace_neither(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with _writing(pipe) as file:
        file.write("rows")
    assert os.read(reader, 100) == b"rows" and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "link").symlink_to("there")
    with _writing(tmp_path / "link") as file:
        file.write("rows")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "rows"


def test_an_oversampling_beyond_all_numbers_takes_the_largest_size() -> None:
    from fastmtl.config import parse_recipe
    from fastmtl.data.schedule import Schedule

    tasks: dict[str, Any] = dict.fromkeys("ab", {"type": "binary", "data": {}})
    many, twice = (
        Schedule([4, 8], parse_recipe({"tasks": tasks, "sampler": {"oversample": times}}, "test"), 1).steps(0)
        for times in (1e300, 2.0)
    )
    assert many == twice


def test_an_error_of_a_solver_names_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd")
    from fastmtl.surgery.methods.order import draw_order
    from fastmtl.surgery.methods.table import find_method

    def fail(gram: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the solver found nothing")

    method: Any = find_method("cagrad", options={"c": 0.4})
    monkeypatch.setattr(method, "_solve", fail)
    with pytest.raises(UserError, match="gradient method cagrad cannot .*: the solver found nothing"):
        method.weights(torch.eye(2), draw_order(2, 0, 0))
