"""The choice of a sink."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastmtl.surgery.ranks.alone import Alone
from fastmtl.surgery.ranks.together import Together
from fastmtl.surgery.sinks.gramian import GramianSink
from fastmtl.surgery.sinks.keep import KeepSink
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.sinks.tensor import TensorSink


def make_sink(
    mode: str,
    shared: Sequence[nn.Parameter],
    num_tasks: int,
    *,
    sparse: Sequence[nn.Parameter],
    dtype: torch.dtype,
    reduce: str,
    sketch_size: int,
) -> Sink:
    """Return the sink that takes task gradients in the given mode.

    mode: a storage ("stacked", "kept" or "replay"), or "tensor" for that scope; "none" (a sum of
    losses) gets a sink that is never armed. dtype: of J in "stacked". sketch_size: used if `reduce`
    is "sketch".
    """
    ranks = Alone() if reduce == "local" else Together()
    size = sketch_size if reduce == "sketch" else None
    match mode:
        case "tensor":
            return TensorSink(shared, num_tasks, sparse=sparse, ranks=ranks)
        case "replay":
            return GramianSink(shared, num_tasks, sparse=sparse, ranks=ranks, sketch_size=size)
        case "kept":
            return KeepSink(shared, num_tasks, sparse=sparse, ranks=ranks, sketch_size=size)
        case _:
            return StackSink(shared, num_tasks, sparse=sparse, dtype=dtype, ranks=ranks, sketch_size=size)
