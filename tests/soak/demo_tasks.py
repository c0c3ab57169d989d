"""The recipe demo-tasks on two processes: each task reaches its minimum score.

The scores of linear models on the same files are far lower (fastmtl/data/baseline.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from launch import cpu_environment, two_processes

FLOORS = {
    "sentiment": ("accuracy", 0.75),
    "paraphrase": ("accuracy", 0.75),
    "similarity": ("pearson", 0.85),
    "entities": ("f1", 0.80),
    "complaints": ("micro_f1", 0.70),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="fewer steps, after which no score is demanded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmtl-soak-") as directory:
        command = [*two_processes(), "--no_python", "fastmtl", "train", "demo-tasks", "--output", f"{directory}/run"]
        command += [f"data.cache_dir={directory}/cache"]
        command += [f"train.max_steps={options.steps}"] if options.steps else []
        done = subprocess.run(command, env=cpu_environment(), stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        scores = json.loads(Path(directory, "run", "results.json").read_text(encoding="utf-8"))["dev"]
    found = {task: scores[task][metric] for task, (metric, _) in FLOORS.items()}
    low = [task for task, (_, floor) in FLOORS.items() if found[task] < floor]
    if low and not options.steps:
        sys.exit(f"{', '.join(low)}: {found}, at least {FLOORS}")
    print(json.dumps({f"{task} {FLOORS[task][0]}": round(score, 3) for task, score in found.items()}))


if __name__ == "__main__":
    main()
