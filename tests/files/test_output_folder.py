"""The rights to write to an output folder, and the error messages before a run starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmtl.errors import UserError
from fastmtl.files.output_folder import OutputFolder, check_output, check_room

HOLD = (
    "import sys; from pathlib import Path; from fastmtl.files.output_folder import OutputFolder\n"
    "folder = OutputFolder(Path(sys.argv[1]), resume=True); print('held', flush=True); sys.stdin.read()"
)


def test_the_second_run_is_refused_until_the_first_is_gone_even_by_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    try:
        for ask in (OutputFolder, check_output):
            with pytest.raises(UserError, match=rf"another run \(process {first.pid} on .*\) is writing to .*--output"):
                ask(tmp_path, resume=True)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    OutputFolder(tmp_path, resume=True).release()


@pytest.mark.parametrize("name", ["lost+found", ".lock"])
def test_what_is_no_run_is_no_obstacle(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "lost+found" else (tmp_path / name).touch()
    OutputFolder(tmp_path, resume=False).release()


def test_a_run_is_an_obstacle_and_lets_go_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="already contains a run: continue it with --resume"):
        OutputFolder(tmp_path, resume=False)
    with pytest.raises(UserError, match="already contains a run"):
        check_output(tmp_path, resume=False)
    check_output(tmp_path, resume=True)
    OutputFolder(tmp_path, resume=True).release()


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    OutputFolder(tmp_path / "link", resume=False).release()
    (tmp_path / "dead").symlink_to("nowhere/at/all")
    (tmp_path / "there" / "file").touch()
    places = {
        "dead": "the output directory .*dead is a link to nothing",
        "there/file": "the output directory .*file is a file",
        "there/file/below": "cannot write to the output directory .*below: Not a directory",
        "x" * 300: "cannot write to the output directory .*x: File name too long",
    }
    for place, message in places.items():
        for ask in (OutputFolder, check_output):
            with pytest.raises(UserError, match=message):
                ask(tmp_path / place, resume=False)


def test_a_read_only_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("fastmtl.files.output_folder.tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot write to .*: Read-only file system"):
        OutputFolder(tmp_path, resume=False)


def test_looking_at_a_folder_writes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "run", resume=False)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match="no space: a checkpoint and model/ take at least .* MiB"):
        check_room(tmp_path, 2**80)
