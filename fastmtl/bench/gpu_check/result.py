"""The result file of gpu-check: measurements and outcome of every part, and the bounds.

This module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmtl.bench.bounds import bounds
from fastmtl.bench.gpu_check.parts import Part
from fastmtl.bench.gpu_check.process import LEFT_OUT, OK, Outcome, read
from fastmtl.measure.result_file import UNFINISHED, save, slug

UNKNOWN = "unknown device"
# Keys with a list of results: several parts measure them, in different sizes or configurations.
LISTS = ("surgery", "engine", "profile")
# A run extends an existing file only if both agree in these fields.
SAME = ("device", "driver", "torch", "triton", "commit")


class ResultFile:
    """The file `<folder>/<device>.json`, rewritten after every part.

    extend: keep what an existing file has, if it is of the same device, versions and commit.
    """

    def __init__(self, folder: Path, environment: dict[str, Any], *, extend: bool = False) -> None:
        device = environment.get("device", UNKNOWN)
        self.path = folder / f"{slug(device)}.json"
        self.pictures = folder / slug(device)
        self.data: dict[str, Any] = {"benchmark": "gpu-check", "environment": environment, "parts": {}}
        self.failures: list[str] = []
        if extend and self.path.exists():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            if all(old["environment"].get(key) == environment.get(key) for key in SAME):
                self.data |= {**old, "environment": environment}
        self.save()

    def add(self, part: Part, outcome: Outcome) -> None:
        """Add a part's outcome and measurements, compare the bounds again, and write the file."""
        entry: dict[str, Any] = {"state": outcome.state, "why": outcome.why, "seconds": round(outcome.seconds, 1)}
        if outcome.tail:
            entry["tail"] = outcome.tail
        measured = read(part.result)
        if measured is None and outcome.state == OK:
            entry |= {"state": "failed", "why": f"the part did not write {part.result.name}"}
        if measured is not None:
            measured.pop("environment", None)
            entry["partial"] = bool(measured.pop(UNFINISHED, False)) or outcome.state != OK
            self._take(part, measured)
        self.data["parts"][part.name] = entry
        if entry["state"] not in (OK, LEFT_OUT):
            self.failures.append(f"{part.name}: {entry['why']}{_failed_tests(measured)}")
        self.data["bounds"] = bounds(self.data)
        self.save()

    def leave_out(self, part: Part, why: str) -> None:
        """Record that a part does not run, and why; write the file."""
        self.data["parts"][part.name] = {"state": LEFT_OUT, "why": why, "seconds": 0.0}
        self.save()

    def left_out(self) -> dict[str, str]:
        """Return the reason for each part that did not run, by the part's name."""
        return {name: entry["why"] for name, entry in self.data["parts"].items() if entry["state"] == LEFT_OUT}

    def save(self) -> None:
        self.data["failures"] = self.failures
        save(self.data, self.path)

    def _take(self, part: Part, measured: dict[str, Any]) -> None:
        key = part.key
        if key == "kernels":
            earlier = self.data.get(key, {}).get("operations", {})
            self.data[key] = {**measured, "operations": {**earlier, **measured["operations"]}}
        elif key == "compute-sanitizer":
            self.data[key] = {**self.data.get(key, {}), **measured}
        elif key == "tests":
            self.data.setdefault(key, {})[part.name] = measured
        elif key in LISTS:
            others = [entry for entry in self.data.get(key, []) if entry["part"] != part.name]
            self.data[key] = [*others, {"part": part.name, **measured}]
        else:
            self.data[key] = measured


def _failed_tests(measured: dict[str, Any] | None) -> str:
    failed = (measured or {}).get("failed")
    return f"; {', '.join(failed)}" if isinstance(failed, dict) and failed else ""
