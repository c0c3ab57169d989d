"""lora: low_rank with both biases and dropout, compared with a loop over tasks."""

from __future__ import annotations

from fastmtl.bench.ops.case import Case
from fastmtl.bench.ops.low_rank import case
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size


def cases(size: Size) -> list[Case]:
    return [case(Rows(size), "lora", biases=True)]
