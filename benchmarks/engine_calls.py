"""Operator calls and host time of each part of a step under DeepSpeed, counted on the CPU.

    python benchmarks/engine_calls.py [--method sum] [--zero 1] [--layers 6] [--precision bf16]
                                      [--no-overflow-check] [--flat] [--graphs]

The step runs in one process (fastmtl/bench/step_calls.py). The last lines of the output list the
places in the code where the host would wait for a GPU.
"""

from __future__ import annotations

import argparse

import torch

from fastmtl.bench.step_calls import count_step

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("pcgrad", "sum"), default="pcgrad")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-overflow-check", action="store_true", help="DeepSpeed's bf16.check_grad_overflow: false")
    parser.add_argument("--flat", action="store_true", help="engine.flat_parameters")
    parser.add_argument("--graphs", action="store_true", help="engine.cuda_graphs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = count_step(
        chosen.method,
        zero=chosen.zero,
        layers=chosen.layers,
        precision=chosen.precision,
        flat=chosen.flat,
        graphs=chosen.graphs,
        deepspeed={"bf16": {"check_grad_overflow": False}} if chosen.no_overflow_check else None,
    )
    outside = f", {found.outside_graphs:,} of them outside graphs" if chosen.graphs else ""
    print(
        f"ZeRO {chosen.zero}, {chosen.layers} layers, {found.parameters} parameters: "
        f"{found.calls.total():,} calls{outside}"
    )
    for part, number in found.calls.items():
        print(f"{part:15} {number:6,} calls {1e3 * found.seconds[part]:8.2f} ms")
    print(f"{len(found.waits)} waits of the host for a GPU", *found.waits, sep="\n")
