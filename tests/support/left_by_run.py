"""Readers of the files in a run's output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def lasting(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the fields that depend on the clock."""
    clocks = ("time", "tokens_per_second", "surgery_seconds")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines(run)]


def weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / f"{part}.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)
