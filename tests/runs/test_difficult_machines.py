"""Machines without a home, a terminal, or room on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastmtl.engine.plain_path import plain_path
from fastmtl.errors import TrainingError, UserError
from fastmtl.files.user_path import cache_path, user_path
from fastmtl.files.writing import writing
from fastmtl.model.encoder.weights import read_tensors

SECURED = "import sys; from fastmtl.system.streams import secure; secure(); "


def run(code: str, shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with a shell's redirection."""
    command = ["sh", "-c", f'"$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_closed_streams_are_usable_and_no_file_gets_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "first"
    code = SECURED + f"file = open({str(file)!r}, 'w'); print('lost'); print('lost', file=sys.stderr); "
    done = run(code + "assert file.fileno() > 2; file.write('kept')", ">&- 2>&- <&-")
    assert done.returncode == 0
    assert file.read_text() == "kept"


def test_signs_that_the_encoding_lacks_are_replaced() -> None:
    done = run(SECURED + "print('na\\u00efve \\u2603')", "", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "na?ve ?\n")


def test_a_thread_that_keeps_its_exception_prints_none() -> None:
    code = (
        "import threading; from fastmtl.system.streams import hide_stored_exceptions; hide_stored_exceptions()\n"
        "class Writer(threading.Thread):\n"
        "    def run(self):\n"
        "        self.exception = OSError('full')\n"
        "        raise self.exception if self.name == 'keeps' else ValueError('another')\n"
        "for name in ('keeps', 'other'):\n"
        "    Writer(name=name).start()\n"
    )
    done = run(code, "")
    assert "full" not in done.stderr and "ValueError: another" in done.stderr


def test_a_reader_that_is_gone_silences_the_console_only() -> None:
    code = (
        "import time, sys; from fastmtl.tracking.display import LastingConsole; console = LastingConsole(); "
        "time.sleep(0.5); [console.print('line') for _ in range(3)]; print('still there', file=sys.stderr)"
    )
    done = run(code, "| true")
    assert done.stderr == "still there\n"


def test_no_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    cache_path.cache_clear()
    folder = cache_path("~/.cache/fastmtl")
    assert folder.is_dir() and cache_path("~/.cache/fastmtl") == folder
    assert f"no home directory; using {folder}" in capsys.readouterr().err
    with pytest.raises(UserError, match="~/bert: this user has no home directory"):
        user_path("~/bert")


def test_weights_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    opened = Path.open

    def refuse(self: Path, *arguments: object, **keywords: Any) -> object:
        if self == file:  # a mode of 0 would not stop root
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **keywords)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="model.safetensors: no permission to read it"):
        read_tensors(file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the file that is always full")
def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path: Path) -> None:
    file = tmp_path / "full.safetensors"
    file.symlink_to("/dev/full")

    def by_python() -> None:
        with file.open("wb") as stream:
            stream.write(bytes(2**16))

    for write in (by_python, lambda: torch.save(torch.zeros(2**16), file)):
        with pytest.raises(TrainingError, match=f"^cannot write {tmp_path}: .*Make room.$") as caught:
            with writing(tmp_path, "Make room."):
                write()
        assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match="No space left on device"), writing(tmp_path):
        by_python()
    with pytest.raises(TrainingError, match="No space left on device"), writing(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="of another kind") as other, writing(tmp_path):
        raise RuntimeError("of another kind")
    assert not isinstance(other.value, TrainingError)


def test_a_path_with_brackets_has_a_plain_one(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "file").touch()
    with plain_path(folder) as plain:
        assert "[" not in str(plain) and (plain / "file").is_file()
    assert folder.is_dir()
    with plain_path(tmp_path) as plain:
        assert plain == tmp_path
