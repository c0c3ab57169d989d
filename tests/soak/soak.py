"""`make soak`: run the checks that take too long for `make test`, one part after another.

    python tests/soak/soak.py [--only kills kernels] [--quick]

Each part is a script of this folder. It prints its figures as JSON in its last line, and fails with
a sentence. The summary goes to .benchmarks/soak.json, and as Markdown to the terminal. The exit
status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The command of each part, and its options for a quick run.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "readers": (["fuzz_readers.py"], ["--inputs", "50"]),
    "large files": (["large_files.py"], ["--rows", "200000"]),
    "truncations": (["truncations.py"], ["--offsets", "5"]),
    "full disk": (["full_disk.py"], ["--fillings", "5"]),
    "kernels": (["kernels.py"], ["--shapes", "200"]),
    "kills": (["kills.py"], ["--kills", "2"]),
    "task gradients": (["task_gradients.py"], ["--seeds", "1", "--nets", "100"]),
    "sharded": (["sharded.py"], []),
    "examples": (["examples.py"], ["--alone"]),
    "serving": (["serving.py"], ["--requests", "1000", "--bodies", "100"]),
    "exported": (["exported.py"], ["--quick"]),
    "steps": (["steps.py"], ["--steps", "200"]),
    "demo tasks": (["demo_tasks.py"], ["--steps", "5"]),
    "notebook": (["notebook.py"], ["--steps", "3"]),
    "distributions": (["distributions.py"], ["--only", "wheel"]),
}


def run_part(name: str, *, quick: bool) -> dict[str, Any]:
    """Return seconds, figures and, if the part failed, the reason."""
    command, less = PARTS[name]
    folders = (".", "kernels", "tools", "tests/support", "tests/kernels", "tests/kernels/cases")
    paths = [str(ROOT / folder) for folder in folders]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    known = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(paths + ([known] if known else [])),
    }
    begun = time.monotonic()
    words = [sys.executable, str(HERE / command[0]), *command[1:], *(less if quick else [])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begun), "holds": done.returncode == 0}
    if done.returncode == 0:
        return found | {"figures": json.loads(lines[-1])}
    told = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
    return found | {"reason": told[-1] if told else "no output", "output": (done.stdout + done.stderr)[-6000:]}


def report(summary: dict[str, Any]) -> str:
    """Return the figures as Markdown for docs/notes/soak.md, wrapped at 100 columns."""
    where = f"{summary['date']}, commit {summary['commit']}, {summary['machine']}, {summary['minutes']} minutes in all:"
    paragraphs = [wrapped(where, ""), ""]
    for name, part in summary["parts"].items():
        figures = part.get("figures", {"failed": part.get("reason")})
        shown = "; ".join(f"{key}: {value}" for key, value in figures.items())
        holds = "passed" if part["holds"] else "**failed**"
        paragraphs.append(wrapped(f"- **{name}**: {holds} in {part['seconds']:,} s. {shown}", "  "))
    return "\n".join(paragraphs)


def wrapped(text: str, indent: str) -> str:
    """Return one paragraph in lines of at most 100 columns; all but the first are indented."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def machine() -> str:
    """Return the processor, the cores that this process may use, and Python's version."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def commit() -> str:
    """Return the checkout's commit, with `-dirty` if files differ from it."""
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that the parts run")
    options = parser.parse_args()
    summary: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "quick": options.quick,
        "parts": {},
    }
    begun = time.monotonic()
    for name in options.only or PARTS:
        found = summary["parts"][name] = run_part(name, quick=options.quick)
        result = json.dumps(found["figures"]) if found["holds"] else f"FAILED: {found['reason']}"
        print(f"{name}: {result} ({found['seconds']} s)", flush=True)
        if not found["holds"]:
            print(found["output"], flush=True)
    summary["minutes"] = round((time.monotonic() - begun) / 60, 1)
    file = ROOT / ".benchmarks" / "soak.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\n{report(summary)}\n\nsummary: {file}")
    sys.exit(any(not part["holds"] for part in summary["parts"].values()))


if __name__ == "__main__":
    main()
