"""Random data files of every format for the readers; fuzzed_reading.py has the checks.

The files differ in every run; the seed is among the figures, and `--seed` repeats a run. `--one
NAME` reads the single file that a failure names.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from fuzzed_reading import case_of, check, fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--one", metavar="NAME")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fastmtl-soak-"))  # kept if a file fails
    if options.one:
        case = case_of(options.one)
        print(case)
        counts = check(case, folder)
    else:
        counts = fuzz(options.seed, options.inputs, folder)
    folder.rmdir()
    print(json.dumps({**counts, "seed": options.seed}))


if __name__ == "__main__":
    main()
