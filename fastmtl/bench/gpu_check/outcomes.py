"""A pytest plugin that saves each test's outcome at once: `-p fastmtl.bench.gpu_check.outcomes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmtl.measure.result_file import save


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", type=Path, help="a JSON file with the outcomes so far")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to the first process
        config.pluginmanager.register(Outcomes(path))


class Outcomes:
    """The outcomes of the tests, saved in a file after each test.

    passed: the number of tests. failed: the error line by test id. skipped: the number by reason.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.strip().splitlines() or [""]
            errors = [line for line in lines if line.startswith("E ")] or lines[-1:]
            self._found["failed"][report.nodeid] = errors[0].removeprefix("E").strip()[:300]
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._found["skipped"][reason] = self._found["skipped"].get(reason, 0) + 1
        elif report.when == "call":
            self._found["passed"] += 1
        else:
            return
        save(self._found, self._path)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._found["failed"][report.nodeid] = report.longreprtext.strip().splitlines()[-1][:300]
            save(self._found, self._path)
