"""The examples of docs/surgery.md, docs/surgery-reference.md and examples/.

Those of the pages run unchanged: a block of Python is a complete example, or continues the one
before it. Those of examples/ run in a tiny size.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import cpu_environment

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
import deepspeed, json, runpy, sys
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
for script, *arguments in json.loads(sys.argv[1]):
    print("running", script, flush=True)
    sys.argv = [script, *arguments]
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
FILES = ROOT / "examples"
# In this order: glue.py, the first that uses DeepSpeed, connects its one process for all that
# follow.
TINY = {
    "physics.py": ["--points", "8", "--width", "8"],
    "vit.py": ["--batch", "9", "--width", "16"],
    "glue.py": ["--batch", "2", "--width", "16"],
    "llama_lora.py": ["--batch", "2", "--width", "16", "--rank", "2"],
}
WITHOUT_SURGERY = ("physics.py", "vit.py")  # those that also run with --method sum


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
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The lines that each script prints, by its number in SCRIPTS or its name in FILES.

    Scripts without DeepSpeed run first, before DeepSpeed connects its ranks.
    """
    folder = tmp_path_factory.mktemp("examples")
    for number, text in enumerate(SCRIPTS):
        (folder / f"{number}.py").write_text(text, encoding="utf-8")
    plain: list[list[str]] = []
    with_deepspeed: list[list[str]] = []
    for number, text in enumerate(SCRIPTS):
        (with_deepspeed if "deepspeed" in text else plain).append([f"{folder}/{number}.py"])
    files = [[str(FILES / name), "--steps", "2", *size] for name, size in TINY.items()]
    for name in WITHOUT_SURGERY:
        (folder / f"sum_{name}").write_text((FILES / name).read_text(encoding="utf-8"), encoding="utf-8")
        plain.append([f"{folder}/sum_{name}", "--steps", "2", "--method", "sum", *TINY[name]])
    scripts = [*plain, *files, *with_deepspeed]
    command = [sys.executable, "-c", RUN, json.dumps(scripts)]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    starts = [*(lines.index(f"running {script}") for script, *_ in scripts), len(lines)]
    return {Path(script).name: lines[starts[k] + 1 : starts[k + 1]] for k, (script, *_) in enumerate(scripts)}


@pytest.mark.slow(15)
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, printed: dict[str, list[str]]) -> None:
    steps = [line for line in printed[f"{number}.py"] if "conflicts" in line]
    assert len(steps) == 5
    if number == 0:  # losses depend on the machine in their last digits
        assert [shape_of(line) for line in steps] == [shape_of(line) for line in PRINTED[0].splitlines()]


def test_examples_of_the_reference_run(printed: dict[str, list[str]]) -> None:
    (several,), (functional,) = (printed[f"{number}.py"] for number in range(len(EXAMPLES), len(SCRIPTS)))
    assert re.fullmatch(r"tensor\(\[\d\.\d*, \d\.\d*, \d\.\d*\]\)", several)
    assert re.fullmatch(r"tensor\(\[1\.0+, -?\d\.\d+\]\)", functional)


def test_page_of_the_examples_shows_every_file() -> None:
    assert {path.name for path in FILES.glob("*.py")} == TINY.keys() == shown_on_page().keys()
    for name in TINY:
        lines = len((FILES / name).read_text(encoding="utf-8").splitlines())
        assert lines <= 120, f"{name} has {lines} lines"


@pytest.mark.parametrize("name", TINY)
def test_example_prints_what_its_page_shows(name: str, printed: dict[str, list[str]]) -> None:
    known = [line for line in printed[name] if not line.startswith("DeepSpeed ")]
    assert [line.split()[1] for line in known if line.startswith("step")] == ["0", "1"]
    assert line_kinds(known) == line_kinds(shown_on_page()[name])


@pytest.mark.parametrize("name", WITHOUT_SURGERY)
def test_example_without_surgery_prints_no_conflicts(name: str, printed: dict[str, list[str]]) -> None:
    steps = [line for line in printed[f"sum_{name}"] if line.startswith("step")]
    assert len(steps) == 2 and not any("conflicts" in line for line in steps)


def shown_on_page() -> dict[str, list[str]]:
    """Return the lines that examples/README.md shows after the command `python examples/NAME`."""
    page = (FILES / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n\$ python examples/(\S+)\n(.*?)```", page, flags=re.DOTALL)
    return {name: text.splitlines() for name, text in blocks}


def line_kinds(lines: list[str]) -> list[str]:
    """Return the lines with "#" for every number, each kind once."""
    return list(dict.fromkeys(re.sub(r" +(-?\d+(\.\d+)?|nan)", " #", line) for line in lines))


def shape_of(line: str) -> str:
    """Return a printed line with its step's number, and "#" for every later number."""
    step, rest = line.split(" ", 1)
    return step + re.sub(r"\d+(\.\d+)?", "#", rest)
