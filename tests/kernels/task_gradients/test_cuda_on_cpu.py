"""Arithmetic and indices of the CUDA kernels, csrc/gradients_kernels.cuh, built for the CPU."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ROOT = Path(__file__).parents[3]
COMPILER = os.environ.get("CXX", "c++").split()[0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
PIECE = 4096

pytestmark = [pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"), pytest.mark.slow(8)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda") / "cuda_on_cpu.so"
    include = Path(torch.__file__).parent / "include"
    command = [COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC", "-isystem", str(include), f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(Path(__file__).with_name("cuda_on_cpu.cpp")), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def addresses(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def described(grads: list[list[Tensor]]) -> list[object]:
    """Return the first arguments of both functions."""
    sizes = (ctypes.c_int64 * len(grads[0]))(*(tensor.numel() for tensor in grads[0]))
    dtypes = (ctypes.c_int * len(grads[0]))(*(SCALAR_TYPES[tensor.dtype] for tensor in grads[0]))
    return [addresses([tensor for task in grads for tensor in task]), sizes, dtypes, len(grads), len(grads[0]), PIECE]


def gramian(library: ctypes.CDLL, grads: list[list[Tensor]]) -> tuple[Tensor, int]:
    gram = torch.full((len(grads), len(grads)), math.nan)
    launches = library.gramian(*described(grads), ctypes.c_void_p(gram.data_ptr()))
    return gram, launches


def combine(library: ctypes.CDLL, grads: list[list[Tensor]], weights: Tensor, out: list[Tensor]) -> int:
    out_dtypes = (ctypes.c_int * len(out))(*(SCALAR_TYPES[tensor.dtype] for tensor in out))
    return library.combine(*described(grads), ctypes.c_void_p(weights.data_ptr()), addresses(out), out_dtypes)


def random_lists(
    num_tasks: int, sizes: list[int], dtypes: list[torch.dtype], shift: int = 0, seed: int = 0
) -> list[list[Tensor]]:
    """Return task gradients; each tensor begins `shift` elements into its memory."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(size + shift, generator=generator).to(dtype)[shift:]
            for size, dtype in zip(sizes, dtypes, strict=True)
        ]
        for _ in range(num_tasks)
    ]


def check(library: ctypes.CDLL, grads: list[list[Tensor]], out_dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Check both operations against float64; return their launches. Outputs lie between guards."""
    rows = torch.stack([torch.cat([torch.zeros(0), *task]).double() for task in grads])
    weights = torch.randn(len(grads), generator=torch.Generator().manual_seed(1))
    gram, gramian_launches = gramian(library, grads)
    norms = rows.norm(dim=1)
    assert ((gram.double() - rows @ rows.T).abs() <= 1e-5 * norms[:, None] * norms).all()
    assert torch.equal(gram, gram.T)

    shift = grads[0][0].storage_offset()
    memory = [
        torch.full((tensor.numel() + shift + 8,), math.nan, dtype=dtype)
        for tensor, dtype in zip(grads[0], out_dtypes, strict=True)
    ]
    out = [m[shift : shift + tensor.numel()] for m, tensor in zip(memory, grads[0], strict=True)]
    combine_launches = combine(library, grads, weights, out)
    for k, (m, merged) in enumerate(zip(memory, out, strict=True)):
        same = torch.stack([task[k] for task in grads]).double()
        exact, magnitude = weights.double() @ same, weights.double().abs() @ same.abs()
        rounding = 0.0 if merged.dtype == torch.float32 else torch.finfo(merged.dtype).eps / 2
        bound = 1.01 * rounding * exact.abs() + (len(grads) + 1) * 2**-23 * magnitude + torch.finfo(merged.dtype).tiny
        assert ((merged.double() - exact).abs() <= bound).all()
        assert m[:shift].isnan().all() and m[shift + merged.numel() :].isnan().all()
    return gramian_launches, combine_launches


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_every_number_of_tasks(library: ctypes.CDLL, num_tasks: int) -> None:
    """Sizes of one element, less than a vector, tails of every dtype and more than one piece."""
    sizes = [1, 7, 0, 4099] if num_tasks <= 8 else [3, 1031]
    dtypes = [DTYPES[k % 3] for k in range(num_tasks, num_tasks + len(sizes))]
    assert check(library, random_lists(num_tasks, sizes, dtypes), dtypes) == (1, 1)


@settings(max_examples=15, deadline=None)
@given(
    num_tasks=st.integers(1, 4),
    tensors=st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=4),
    shift=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_any_sizes_dtypes_and_alignment(
    library: ctypes.CDLL,
    num_tasks: int,
    tensors: list[tuple[int, torch.dtype, bool]],
    shift: int,
    seed: int,
) -> None:
    sizes, dtypes, as_float = (list(column) for column in zip(*tensors, strict=True))
    out_dtypes = [torch.float32 if wide else dtype for dtype, wide in zip(dtypes, as_float, strict=True)]
    check(library, random_lists(num_tasks, sizes, dtypes, shift, seed), out_dtypes)


def test_hundreds_of_tensors_take_one_launch_and_more_take_two(library: ctypes.CDLL) -> None:
    sizes = [k % 5 if k % 50 > 45 else 0 for k in range(450)]
    dtypes = [DTYPES[k % 3] for k in range(450)]
    assert check(library, random_lists(3, sizes[:400], dtypes[:400]), dtypes[:400]) == (1, 1)
    assert check(library, random_lists(3, sizes, dtypes), dtypes) == (2, 2)
