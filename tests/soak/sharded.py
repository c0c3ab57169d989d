"""Surgery on parameters of fully_shard (FSDP2), on four ranks against one process.

The cases are those of tests/surgery/test_sharded.py, and HSDP on a mesh of two by two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import sharded_cases as cases
import torch


def main() -> None:
    every = [*cases.CASES, *cases.HYBRID]
    with tempfile.TemporaryDirectory(prefix="fastmtl-soak-") as directory:
        status = subprocess.run([sys.executable, cases.__file__, directory, "4"], stdout=sys.stderr).returncode
        if status:
            sys.exit(status)
        ranks = [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(4)]
    for case in every:
        expected = cases.train_alone(case)
        for rank in ranks:
            cases.compare(rank[case.name], expected, case)
    print(json.dumps({"equal to one process on four ranks": ", ".join(case.name for case in every)}))


if __name__ == "__main__":
    main()
