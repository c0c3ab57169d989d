"""A whole training step beside transformers' and its matrix products, on two sizes of encoders: `make bench`.

Options are those of `fastmtl bench step`, which measures. Results are kept in .benchmarks/step-*.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastmtl.cli import app

RESULTS = Path(".benchmarks")

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    for shape in ("minilm", "bert-base"):
        file = RESULTS / f"step-{shape}.json"
        app(["bench", "step", "--shape", shape, "--json", str(file), *sys.argv[1:]], standalone_mode=False)
