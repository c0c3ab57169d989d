"""low_rank and lora: adapters of all tasks at once, compared with PEFT and a loop over tasks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Way, Work, ours, plain
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl.measure.harness import Skipped
from fastmtl_kernels import low_rank

RANK = 8


def cases(size: Size) -> list[Case]:
    """Return the case without biases and dropout, which PEFT's layer computes as well."""
    return [case(Rows(size), "low_rank", biases=False)]


def case(rows: Rows, name: str, biases: bool) -> Case:
    tokens, tasks, width = rows.tokens, rows.size.tasks, rows.size.shape.hidden
    tensors = {
        "x": rows.randn(tokens, width),
        "down": rows.randn(tasks, width, RANK, scale=width**-0.5),
        "up": rows.randn(tasks, RANK, width, scale=RANK**-0.5),
    }
    if biases:
        tensors.update(down_bias=rows.randn(tasks, RANK), up_bias=rows.randn(tasks, width))
    layout = rows.padded({"x", "output"})
    peers = [] if biases else [Way("peft", lambda: _peft(rows), layout)]
    matrix = tokens * width * rows.dtype.itemsize
    weights = 2 * tasks * width * RANK * rows.dtype.itemsize
    product = 2 * tokens * width * RANK
    return Case(
        name,
        f"{rows.about} of {tasks} tasks, {width} columns, rank {RANK}",
        tensors,
        _fastmtl(rows, "reference"),
        [*ours(rows.device, name, lambda impl: _fastmtl(rows, impl)), *plain(_loop(rows)), *peers],
        {"forward": Work(2 * matrix + weights, 2 * product), "backward": Work(3 * matrix + 2 * weights, 4 * product)},
        rows.randn(tokens, width),
        tuple(tensors),
        rows.size.dropout if biases else 0.0,
        tokens,
    )


def _fastmtl(rows: Rows, impl: str) -> Run:
    offsets = rows.token_offsets

    def run(t: Tensors, dropout: float) -> Tensor:
        return low_rank(token_offsets=offsets, dropout_p=dropout, seed=rows.seed, impl=impl, **t)  # type: ignore[arg-type]

    return run


def _loop(rows: Rows) -> Run:
    def run(t: Tensors, dropout: float) -> Tensor:
        parts = []
        for task, (start, stop) in enumerate(pairwise(rows.task_rows)):
            narrow = t["x"][start:stop] @ t["down"][task]
            if "down_bias" in t:
                narrow = narrow + t["down_bias"][task]
            wide = narrow @ t["up"][task]
            parts.append(F.dropout(wide + t["up_bias"][task], dropout) if "up_bias" in t else wide)
        return torch.cat(parts)

    return run


class _ZeroLinear(nn.Linear):
    """A base layer for PEFT that outputs zeros, since only the adapters are measured."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _peft(rows: Rows) -> Run:
    """Return the function of PEFT's layer with one adapter per task, chosen by name per text."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Skipped(f"{error}: pip install 'fastmtl-torch[bench]'") from None
    width, tasks = rows.size.shape.hidden, rows.size.tasks
    base = nn.Sequential(_ZeroLinear(width, width, bias=False)).to(rows.device, rows.dtype)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    # "0" is the name of the first task's adapter.
    model: Any = get_peft_model(base, config, "0", autocast_adapter_dtype=False)
    for task in range(1, tasks):
        model.add_adapter(str(task), config, autocast_adapter_dtype=False)
    model.eval()  # PEFT mixes adapters in a batch in this mode only; the case has no dropout
    counts = [stop - start for start, stop in pairwise(rows.task_sequences)]
    names = [str(task) for task, count in enumerate(counts) for _ in range(count)]
    prefix = next(name for name, _ in model.named_parameters() if "lora_A" in name).split("lora_A")[0]

    def run(t: Tensors, _: float) -> Tensor:
        weights = {}
        for task in range(tasks):
            weights[f"{prefix}lora_A.{task}.weight"] = t["down"][task].T
            weights[f"{prefix}lora_B.{task}.weight"] = t["up"][task].T
        out: Tensor = functional_call(model, weights, (t["x"],), {"adapter_names": names})
        return out

    return run
