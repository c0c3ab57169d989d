"""2,000 steps of two processes on the demo: finite losses, flat memory, steady speed.

benchmarks/long_run.py has the checks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LONG_RUN = Path(__file__).parents[2] / "benchmarks" / "long_run.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmtl-soak-") as directory:
        file = Path(directory) / "long-run.json"
        command = [sys.executable, str(LONG_RUN), "--output", f"{directory}/runs", "--small", "2", "64"]
        command += ["--steps", str(options.steps), "--json", str(file)]
        status = subprocess.run(command, stdout=sys.stderr).returncode
        if status:
            sys.exit(status)
        found = json.loads(file.read_text())
    memory = found["memory"]
    most = max(late / early for early, late in zip(memory["at_50"], memory["most"], strict=True)) - 1
    print(
        json.dumps(
            {
                "steps": found["losses"]["steps"],
                "MiB of each rank, steps 50 to 99": memory["at_50"],
                "highest 50 steps later": memory["most"],
                "growth, at most 2 % allowed": f"{most:.1%}".replace("%", " %"),
                "tokens/s by quarter": found["speed"]["tokens_per_second"],
                "steps equal to the bit after two stops": found["resumed"]["equal_steps"],
            }
        )
    )


if __name__ == "__main__":
    main()
