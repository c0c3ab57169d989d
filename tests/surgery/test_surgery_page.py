"""The examples of docs/surgery.md and docs/surgery-reference.md, run unchanged.

A block of Python is a complete example, or continues the one before it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import cpu_environment

from fastmtl.engine.distributed import free_port

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "surgery.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
CHANGES = re.findall(r"```diff\n(.*?)```", TEXT, flags=re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
# All examples run in one process, because a process takes longer to start than they run. At its
# first start on a CPU, DeepSpeed compiles an operator for a minute that only its sharded inference
# uses.
RUN = """
import deepspeed, runpy, sys
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
for script in sys.argv[1:]:
    print("running", script)
    runpy.run_path(script, run_name="__main__")
"""
EXAMPLES: list[str] = []
for block in BLOCKS:
    if "import GradientSurgery" in block:
        EXAMPLES.append(block)
    else:
        EXAMPLES[-1] += block
REFERENCE = (ROOT / "docs" / "surgery-reference.md").read_text(encoding="utf-8")
SCRIPTS = [*EXAMPLES, *re.findall(r"```python\n(import torch\n.*?)```", REFERENCE, flags=re.DOTALL)]


def test_every_way_is_shown() -> None:
    hugging_face, zero_3, plain_loop = EXAMPLES
    assert "deepspeed" not in plain_loop and "SurgeryAdamW(" in plain_loop
    for example in EXAMPLES:
        assert "BertModel(" in example and "with surgery.rows(" in example
    assert "surgery.backward(" in hugging_face
    assert '"stage": 3' in zero_3 and "surgery.run(" in zero_3
    (printed,) = PRINTED
    assert len(printed.splitlines()) == 5 and TEXT.index(printed) < TEXT.index(BLOCKS[0])


def test_short_versions_are_those_of_the_first_example() -> None:
    (changes,) = CHANGES
    added = [line[1:] for line in changes.splitlines() if line.startswith("+")]
    (readme,) = re.findall(r"```python\n(from fastmtl.surgery.*?)```", README, flags=re.DOTALL)
    of_readme = [line.split("  # ")[0] for line in readme.splitlines() if line and "loader" not in line]
    assert len(added) == 6 and len(of_readme) == 7
    assert {*added, *of_readme} <= set(BLOCKS[0].splitlines())


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """The lines that each script prints.

    Scripts without DeepSpeed run first, before DeepSpeed connects its ranks.
    """
    folder = tmp_path_factory.mktemp("examples")
    order = sorted(range(len(SCRIPTS)), key=lambda number: "deepspeed" in SCRIPTS[number])
    scripts = [folder / f"{number}.py" for number in order]
    for number, script in zip(order, scripts, strict=True):
        script.write_text(SCRIPTS[number], encoding="utf-8")
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-c", RUN, *map(str, scripts)]
    done = subprocess.run(command, env=cpu_environment() | ranks, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    starts = [*(lines.index(f"running {script}") for script in scripts), len(lines)]
    return {number: lines[starts[k] : starts[k + 1]] for k, number in enumerate(order)}


@pytest.mark.slow(10)
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, printed: dict[int, list[str]]) -> None:
    steps = [line for line in printed[number] if "conflicts" in line]
    assert len(steps) == 5
    if number == 0:  # losses depend on the machine in their last digits
        assert [shape_of(line) for line in steps] == [shape_of(line) for line in PRINTED[0].splitlines()]


def test_example_of_the_reference_runs(printed: dict[int, list[str]]) -> None:
    _, line = printed[len(EXAMPLES)]
    assert re.fullmatch(r"tensor\(\[1\.0+, -?\d\.\d+\]\)", line)


def shape_of(line: str) -> str:
    """Return a printed line with its step's number, and "#" for every later number."""
    step, rest = line.split(" ", 1)
    return step + re.sub(r"\d+(\.\d+)?", "#", rest)
