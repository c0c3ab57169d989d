"""Runs without a report: its plots take longer than the few steps of a test's run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock


def results_only() -> contextlib.AbstractContextManager[object]:
    """Return a context in which runs write results.json, but no report.html."""

    def write(output: Path, results: dict[str, Any]) -> None:
        (output / "results.json").write_text(json.dumps(results), encoding="utf-8")

    return mock.patch("fastmtl.loop.write_report", write)
