"""Write device, driver, versions and commit to a file.

python -m fastmtl.bench.gpu_check.about cuda FILE [--commit NAME]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastmtl.bench.gpu_check.process import NO_DEVICE
from fastmtl.measure.environment import environment
from fastmtl.measure.result_file import save

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--commit")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here", file=sys.stderr)
        sys.exit(NO_DEVICE)
    save(environment(torch.device(chosen.device), chosen.commit), chosen.file)
