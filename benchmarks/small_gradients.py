"""gramian and combine in a few small sizes, for `make gpu-check` under compute-sanitizer.

    python benchmarks/small_gradients.py cuda

The sizes are not multiples of the kernels' vectors, loop steps and pieces, so out-of-range accesses
would show. Tensors are aligned to 16 bytes in half of the cases.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastmtl_kernels import combine, gramian, implementations
from fastmtl_kernels.task_gradients import reference

SIZES = ([1], [4_096], [40_001])
SEVERAL = [63, 4_096, 5, 1, 20_003]  # a task's gradient as a list of five tensors


def main(device: str) -> None:
    available = {entry.impl for entry in implementations(device)["gramian"] if entry.available} - {"reference"}
    count = 0
    for impl in sorted(available):
        for dtype in (torch.float32, torch.bfloat16):
            for tasks in (1, 3, 9):
                for sizes in SIZES if impl == "triton" else (*SIZES, SEVERAL):
                    for shift in (0, 1):
                        _compare(impl, device, dtype, tasks, sizes, shift)
                        count += 1
    print(f"{count} cases of {', '.join(sorted(available)) or 'no implementation'} agree with the reference")
    sys.exit(0 if count else 1)


def _compare(impl: Any, device: str, dtype: torch.dtype, tasks: int, sizes: list[int], shift: int) -> None:
    # The reference runs on the host, so that only the kernels are instrumented.
    host = [[torch.randn(size + shift).to(dtype) for size in sizes] for _ in range(tasks)]
    grads = [[tensor.to(device)[shift:] for tensor in task] for task in host]
    host = [[tensor[shift:].clone() for tensor in task] for task in host]
    weights = torch.linspace(-1, 1, tasks)
    wanted = reference.gramian(host)
    norms = wanted.diagonal().sqrt()
    gram = gramian(grads, impl).cpu()
    assert ((gram - wanted).abs() <= 1e-5 * norms[:, None] * norms).all(), (impl, dtype, tasks, sizes, shift)
    merged = [torch.empty_like(tensor, dtype=torch.float32) for tensor in host[0]]
    reference.combine(host, weights, merged)
    out = [torch.full(tensor.shape, torch.nan, device=device) for tensor in host[0]]
    combine(grads, weights.to(device), out, impl)
    for found, expected in zip(out, merged, strict=True):
        assert torch.allclose(found.cpu(), expected, rtol=1e-5, atol=1e-5), (impl, dtype, tasks, sizes, shift)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
