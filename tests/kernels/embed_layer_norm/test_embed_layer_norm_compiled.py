"""Triton kernels of embed_layer_norm, compiled ahead of time: no spills, accesses of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compiled import Vectors, check_vectors, meta


def launches() -> None:
    """Launch the forward of BERT-base's embeddings in bfloat16, with dropout and three tasks."""
    from fastmtl_kernels.embed_layer_norm import triton as embed_layer_norm_triton
    from fastmtl_kernels.layer_norm.common import RowNorm
    from fastmtl_kernels.task_sink import TaskRows

    column, seed = meta(768), meta(1, dtype=torch.int64)
    tasks = TaskRows(meta(4, dtype=torch.int32), 8192, None)
    call = RowNorm(embed_layer_norm_triton, 0.1, 1e-12, tasks, None, True, torch.bfloat16)
    ids, tables = meta(8192, dtype=torch.int64), (meta(30522, 768), meta(512, 768), meta(2, 768))
    embed_layer_norm_triton.forward((ids, ids, ids), tables, column, column, seed, call)


EXPECTED = {
    "_embed_layer_norm_fwd_kernel": Vectors(3, 2, 64, 16),
}


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    check_vectors(compile_ahead(launches, 90), EXPECTED)
