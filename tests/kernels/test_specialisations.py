"""A kernel is compiled once, for any number of rows and any addresses of small tensors.

Triton makes a variant of a kernel for each pattern of pointers that are aligned to 16 bytes, and
for
some values of integers. A variant that only some batches need would be compiled during training.
Here the launchers get CPU tensors, and Triton's key of each variant is noted instead of compiling.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton  # noqa: E402

import triton_aot  # noqa: E402
from fastmtl_kernels.add_layer_norm import triton as add_layer_norm_triton
from fastmtl_kernels.combined_adamw import triton as combined_adamw_triton
from fastmtl_kernels.combined_adamw.reference import Update, Written  # noqa: E402
from fastmtl_kernels.dropout import triton as dropout_triton
from fastmtl_kernels.embed_layer_norm import triton as embed_layer_norm_triton
from fastmtl_kernels.geglu import triton as geglu_triton
from fastmtl_kernels.layer_norm.common import RowNorm  # noqa: E402
from fastmtl_kernels.pool import triton as pool_triton
from fastmtl_kernels.task_gradients import triton as gradients_triton
from fastmtl_kernels.task_maps.common import Maps, Wants  # noqa: E402
from fastmtl_kernels.task_maps.triton import launch as low_rank_triton
from fastmtl_kernels.task_sink import TaskRows  # noqa: E402
from fastmtl_kernels.varlen_attention.plan import AttentionPlan  # noqa: E402
from fastmtl_kernels.varlen_attention.triton import launch as varlen_attention_triton
from fastmtl_kernels.varlen_attention.triton import rotary
from fastmtl_kernels.varlen_attention.triton.bias import Bias, BiasSums, bias_gradient  # noqa: E402

KERNELS = Path(inspect.getfile(dropout_triton)).parents[1]
WIDTH, HEADS, TASKS = 64, 4, 3
# Lengths of sequences, short and long. Their sums are even and odd, so that data after N numbers is
# aligned in some batches only.
BATCHES = ([3, 70, 5], [64, 64, 64], [1, 1, 130], [17, 1, 1], [100, 80, 75], [5, 8, 81])


def at_every_place(values: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return the values as slices of longer tensors, which begin at the first to fourth element."""
    return [torch.tensor([*[0] * place, *values], dtype=dtype)[place:] for place in range(4)]


def batches() -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yield lengths, offsets of tasks with one sequence each, ids [N] and a seed."""
    for lengths in BATCHES:
        offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        seeds = torch.arange(4).split(1)
        places = zip(at_every_place(offsets, torch.int32), at_every_place([1] * offsets[-1], torch.int64), strict=True)
        for (where, ids), seed in zip(places, seeds, strict=True):
            yield lengths, where, ids, seed


def rows_of(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, WIDTH, dtype=torch.bfloat16), torch.zeros(WIDTH, dtype=torch.bfloat16)


def add_layer_norm() -> None:
    for _, where, ids, seed in batches():
        rows, column = rows_of(len(ids))
        call = RowNorm(add_layer_norm_triton, 0.1, 1e-12, TaskRows.make(where, len(ids), where.device), None, True)
        _, z, mean, rstd, _ = add_layer_norm_triton.forward(rows, rows, rows, column, column, seed, call)
        add_layer_norm_triton.recompute(z, mean, rstd, column, column, call)
        add_layer_norm_triton.backward(rows, z, mean, rstd, column, seed, call, dx_dtype=rows.dtype, want_sums=True)


def embed_layer_norm() -> None:
    for _, where, ids, seed in batches():
        table, column = rows_of(2)
        call = RowNorm(embed_layer_norm_triton, 0.1, 1e-12, TaskRows.make(where, len(ids), where.device), None, True)
        embed_layer_norm_triton.forward((ids, ids, ids), (table, table, table), column, column, seed, call)


def dropout() -> None:
    for _, _, ids, seed in batches():
        dropout_triton.dropout(rows_of(len(ids))[0], 0.1, seed)


def pool() -> None:
    for _, where, ids, _ in batches():
        out, winners = pool_triton.forward(rows_of(len(ids))[0], where, "max")
        pool_triton.backward(out, where, winners, "max", len(ids))


def geglu() -> None:
    for _, _, ids, _ in batches():
        x = rows_of(len(ids))[0]
        geglu_triton.backward(geglu_triton.forward(x, "none"), x, "none")


def attention() -> None:
    for lengths, where, ids, seed in batches():
        plan = AttentionPlan.make(where.tolist(), len(ids))
        qkv = torch.zeros(len(ids), 3, HEADS, WIDTH // HEADS, dtype=torch.bfloat16)
        out, stats = varlen_attention_triton.forward(qkv, plan, 0.25, 0.1, seed)
        assert bool(len(stats)) == (max(lengths) > 64)
        varlen_attention_triton.backward(qkv, out, stats, out, plan, 0.25, 0.1, seed)


def attention_with_positions() -> None:
    """Launch attention with rotary positions and a bias whose size depends on the batch."""
    for lengths, where, ids, seed in batches():
        plan = AttentionPlan.make(where.tolist(), len(ids))
        qkv = torch.zeros(len(ids), 3, HEADS, WIDTH // HEADS, dtype=torch.bfloat16)
        table = torch.zeros(2, max(lengths), WIDTH // HEADS // 2)
        qkv = rotary.rotated(qkv, table, plan)
        bias = Bias(torch.zeros(len(lengths), HEADS, 2 * max(lengths) - 1), where)
        sums = BiasSums.empty(bias, plan, HEADS)
        out, stats = varlen_attention_triton.forward(qkv, plan, 0.25, 0.1, seed, 64, bias)
        dqkv = varlen_attention_triton.backward(qkv, out, stats, out, plan, 0.25, 0.1, seed, 64, bias, sums)
        rotary.rotate_back(dqkv, table, plan)
        bias_gradient(bias, sums, plan)


def low_rank() -> None:
    weight, bias = torch.zeros(TASKS, WIDTH, 16, dtype=torch.bfloat16), torch.zeros(TASKS, 16, dtype=torch.bfloat16)
    second, second_bias = weight.mT, torch.zeros(TASKS, WIDTH, dtype=torch.bfloat16)
    for _, where, ids, seed in batches():
        tasks, rows = TaskRows.make(where, len(ids), where.device), rows_of(len(ids))[0]
        call = Maps(low_rank_triton, tasks, "gelu", "identity", (0.1,) * TASKS, True)
        y, h = low_rank_triton.forward(rows, weight, bias, second, second_bias, seed, call)
        assert y is not None
        wants = Wants(True, True, True, True, True)
        low_rank_triton.backward(y, rows, weight, second, second_bias, seed, h, call=call, wants=wants)


def compact_rows() -> None:
    """Launch the operations on gradients of the rows that a batch reads of a table."""
    weights, update = torch.zeros(TASKS), Update.at(1, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    p, m, v = (torch.zeros(200, WIDTH) for _ in range(3))
    target = Written(p, m, v, None)
    for _, _, ids, _ in batches():
        rows = torch.zeros(TASKS, len(ids), WIDTH)
        gradients_triton.gramian([[row.view(-1)] for row in rows])
        gradients_triton.combine([[row.view(-1)] for row in rows], weights, [torch.zeros(len(ids) * WIDTH)])
        slots = torch.zeros(200, dtype=torch.int32)
        combined_adamw_triton.combined_adamw([[row] for row in rows], weights, [target], update, slots)


def dense_step() -> None:
    targets = [Written(torch.zeros(n), torch.zeros(n), torch.zeros(n), None) for n in (64, 640)]
    gradients = [[torch.zeros(64), torch.zeros(640)] for _ in range(TASKS)]
    for step in (1, 2, 1000):
        update = Update.at(step, 1e-3, (0.9, 0.999), 1e-8, 0.01)
        combined_adamw_triton.combined_adamw(gradients, torch.zeros(TASKS), targets, update, None)


OPERATIONS = [
    add_layer_norm,
    embed_layer_norm,
    dropout,
    pool,
    geglu,
    attention,
    attention_with_positions,
    low_rank,
    compact_rows,
    dense_step,
]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], Counter[str]]:
    """Return a function that counts how often a call would compile each kernel."""
    # Restores the driver that `launches` replaces.
    monkeypatch.setattr(triton.runtime.driver, "_active", None)

    def count(operation: Callable[[], None]) -> Counter[str]:
        return Counter(launch.kernel.__name__ for launch in triton_aot.launches(operation, 90))

    return count


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_one_for_all_batches(
    variants: Callable[[Callable[[], None]], Counter[str]], operation: Callable[[], None]
) -> None:
    compiled = variants(operation)
    assert compiled and set(compiled.values()) == {1}, compiled


@pytest.mark.slow
def test_every_kernel_is_tried(variants: Callable[[Callable[[], None]], Counter[str]]) -> None:
    tried = Counter[str]()
    for operation in OPERATIONS:
        tried |= variants(operation)
    sources = [path.read_text() for path in KERNELS.rglob("*.py")]
    assert tried.keys() == {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
