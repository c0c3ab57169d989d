"""Locks in the folder of torch's extensions: those of dead builders are removed, others stay."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fastmtl.engine import extension_locks

HOUR = 3600


@pytest.fixture(params=[False, True], ids=["default", "TORCH_EXTENSIONS_DIR"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        folder = tmp_path / "cpu_adam"
    else:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(extension_locks, "get_default_build_root", lambda: str(tmp_path))
        folder = tmp_path / "py_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    path = folder / "lock"
    path.touch()
    return path


def test_a_dead_builders_lock_is_removed(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(lock, (time.time() - HOUR, time.time() - HOUR))
    assert extension_locks.release() == [lock]
    assert not lock.exists()
    assert str(lock) in capsys.readouterr().out


def test_a_living_builders_lock_stays(lock: Path) -> None:
    os.utime(lock, (time.time() - HOUR, time.time() - HOUR))
    with lock.open():
        assert extension_locks.release() == []
    assert lock.exists()


def test_a_young_lock_gets_time(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = threading.Timer(0.3, lock.unlink)
    builder.start()
    assert extension_locks.release(patience=60, poll=0.05) == []
    builder.join()
    assert f"{lock}: waiting up to" in capsys.readouterr().out


def test_a_young_lock_is_removed_in_the_end(lock: Path) -> None:
    assert extension_locks.release(patience=0.3, poll=0.05) == [lock]


def test_no_folder_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert extension_locks.release() == []
