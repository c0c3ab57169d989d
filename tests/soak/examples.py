"""The examples of examples/ in full size, alone and on two processes: they end, and they learn."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from launch import cpu_environment, two_processes

FILES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
MORE = {"vit.py": [["--features"]]}  # further runs
NUMBER = re.compile(r"\d+\.\d+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", action="store_true", help="one process only")
    options = parser.parse_args()
    starts = [[sys.executable], *([] if options.alone else [two_processes()])]
    figures: dict[str, str] = {}
    for file in FILES:
        for arguments in [[], *MORE.get(file.name, [])]:
            for processes, start in enumerate(starts, start=1):
                name = " ".join([file.name, *arguments, f"on {processes}"])
                figures[name] = train(name, [*start, str(file), *arguments])
    print(json.dumps(figures))


def train(name: str, command: list[str]) -> str:
    """Return the sums of the losses of the first and the last printed step."""
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    steps = [line.split("conflicts")[0] for line in done.stdout.splitlines() if line.startswith("step ")]
    first, *_, last = (sum(map(float, NUMBER.findall(line))) for line in steps)
    if not last < 0.6 * first:
        sys.exit(f"{name} does not learn: losses {first:.3f}, then {last:.3f}")
    return f"losses {first:.3f} to {last:.3f}"


if __name__ == "__main__":
    main()
