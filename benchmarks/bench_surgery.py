"""What PCGrad costs over a joint step, on two sizes of encoders and over the number of tasks: `make bench`.

Options are those of `fastmtl bench surgery`, which measures. Results are kept in .benchmarks/surgery-*.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastmtl.cli import app

RUNS = {"minilm": ["--shape", "minilm"], "bert-base": ["--shape", "bert-base"], "tasks": ["--sweep"]}
RESULTS = Path(".benchmarks")

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    for name, arguments in RUNS.items():
        file = RESULTS / f"surgery-{name}.json"
        app(["bench", "surgery", *arguments, "--json", str(file), *sys.argv[1:]], standalone_mode=False)
