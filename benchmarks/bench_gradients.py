"""gramian and combine against a memory copy of as many bytes: `make bench`.

Options are those of `fastmtl bench gradients`, which measures. The result is kept in .benchmarks/gradients.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastmtl.cli import app

RESULTS = Path(".benchmarks")

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    app(["bench", "gradients", "--json", str(RESULTS / "gradients.json"), *sys.argv[1:]], standalone_mode=False)
