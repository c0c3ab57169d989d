"""PCGrad in several ways at equal work: the line through two peaks, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmtl import cli
from fastmtl.bench import ops, peers, sizes, surgery
from fastmtl.errors import UserError
from fastmtl.measure.harness import MIB

GIB = 1024 * MIB


def test_a_line_through_two_peaks() -> None:
    assert peers.line({32: 100, 64: 164}) == (36, 2)
    assert peers.line({32: 100, 128: 301, 64: 173}) == (45, 2)  # of the two largest
    with pytest.raises(UserError, match="memory did not grow with the batch"):
        peers.line({32: 100, 64: 100})


def test_on_a_gpu_the_largest_batch_has_been_run() -> None:
    tried = []

    def peak(rows: int) -> int:
        tried.append(rows)
        if rows > 110:
            raise torch.cuda.OutOfMemoryError("no memory")
        return 100 + 9 * rows

    points = {10: 190, 20: 280}
    assert peers._measured_largest(peak, points, 120, 1000) == 100
    assert tried[0] == 120 and tried[-1] == 100 and points[100] == 1000


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Peaks are made up: a process for each takes seconds, and test_bench.py measures some."""
    made_up = {"autograd": 3, "sum": 3, "pcgrad stacked": 3, "pcgrad replay": 4, "textbook": 5}
    made_up |= {"torchjd": 6, "torchjd autogram": 7}

    def peak(function: object, *arguments: object, preload: str) -> int:
        if function is peers._idle:
            return 50 * MIB
        name, size, _ = arguments
        return (150 + made_up[name] * size.shape.rows) * MIB  # type: ignore[attr-defined]

    monkeypatch.setitem(sizes.SHAPES, "minilm", ops.TINY)
    monkeypatch.setattr(surgery, "in_own_process", peak)
    monkeypatch.setattr(peers, "in_own_process", peak)
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "peers.json"
    cli.app(["bench", "peers", "--rounds", "1", "--json", str(file)], standalone_mode=False)
    result = json.loads(file.read_text())
    moments = 8 * ops.TINY.parameters
    assert set(result["peers"]) == {peers.SHOWN[name] for name in made_up if name in peers.SHOWN} - {
        peers.SHOWN[name] for name in result["skipped"] if name in peers.SHOWN
    }
    joint = result["peers"]["joint step"]
    for name, shown in peers.SHOWN.items():
        entry = result["peers"].get(shown)
        if entry is not None:
            memory = (100 + made_up[name] * 4) * MIB + moments
            assert entry["memory_mib"] == pytest.approx(memory / MIB)
            assert entry["memory_to_joint"] == entry["memory_mib"] / joint["memory_mib"]
            assert entry["mib_per_row"] == made_up[name]
            assert entry["largest_rows"] == (24 * GIB - 100 * MIB - moments) // (made_up[name] * MIB)
    assert result["largest"] == "predicted"
    assert "texts in 24 GiB, predicted" in capsys.readouterr().out
