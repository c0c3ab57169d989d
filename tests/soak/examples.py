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
NUMBER = re.compile(r"\d+\.\d+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", action="store_true", help="one process only")
    options = parser.parse_args()
    figures: dict[str, str] = {}
    for file in FILES:
        starts = [[sys.executable]] if options.alone else [[sys.executable], two_processes()]
        for processes, start in enumerate(starts, start=1):
            done = subprocess.run(
                [*start, str(file)], env=cpu_environment(), capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{file.name} on {processes}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
            steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
            first, last = (
                sum(map(float, NUMBER.findall(line.split("conflicts")[0]))) for line in (steps[0], steps[-1])
            )
            assert last < 0.6 * first, f"{file.name} on {processes} does not learn: losses {first:.3f}, then {last:.3f}"
            figures[f"{file.name} on {processes}"] = f"losses {first:.3f} to {last:.3f}"
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
