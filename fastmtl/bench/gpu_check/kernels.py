r"""Run one operation of `fastmtl bench kernels` without the command, whose typer may be missing.

    python -m fastmtl.bench.gpu_check.kernels pool --shape bert-base --tokens 8192 --device cuda \
        --rounds 11 --json FILE

torch.compile is left out, as it takes minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmtl.bench.kernels import bench_kernels
from fastmtl.bench.ops.case import COMPILED
from fastmtl.bench.report import keeper, progress, save, show, wide
from fastmtl.bench.sizes import SHAPES, Size

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation")
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit")
    parser.add_argument("--json", type=Path, required=True)
    chosen = parser.parse_args()
    size = Size(SHAPES[chosen.shape], 3, chosen.tokens, chosen.device, chosen.precision, 0.1)
    with progress() as say:
        keep = keeper(chosen.json)
        result = bench_kernels(size, chosen.rounds, say, [chosen.operation], (), chosen.commit, [COMPILED], keep)
    save(result, chosen.json)
    show(result, wide())
