"""The tests of Triton kernels in Triton's interpreter, in one process.

Triton reads TRITON_INTERPRET when it is imported, so these tests need their own process. It takes
seconds to start, so all operations share it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from interpreter import INTERPRETED

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("test_*_interpreted.py"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ElementTree.Element]]:
    """Return the test cases of each file, by its stem, in pytest's XML."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *map(str, FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr  # 1: tests have failed, below
    cases: dict[str, list[ElementTree.Element]] = {file.stem: [] for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        cases[case.attrib["classname"].rpartition(".")[2]].append(case)
    assert (ran.returncode == 1) == any(map(failures, cases.values())), ran.stdout + ran.stderr
    return cases


def failures(cases: list[ElementTree.Element]) -> str:
    return "\n".join(part.text or "" for case in cases for part in case if part.tag in ("failure", "error"))


@pytest.mark.slow(35)
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.parametrize("file", [file.stem for file in FILES])
def test_kernels_in_the_interpreter(found: dict[str, list[ElementTree.Element]], file: str) -> None:
    cases = found[file]
    assert not failures(cases), failures(cases)
    assert any(case.find("skipped") is None for case in cases), "no test has run"


def test_every_file_is_found() -> None:
    assert len(FILES) == len({file.stem for file in FILES}) == 11
