"""A whole training step with dropout: forward, backward and AdamW. Against transformers' eager model on padded batches,
and against the step's matrix products alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.bench.environment import environment
from fastmtl.bench.harness import Say, interleave, summary
from fastmtl.bench.sizes import SEED, Size
from fastmtl.bench.workload import Workload
from fastmtl.surgery import GradientSurgery

# float32: other orders of addition. bfloat16: 8 bits in every activation of a few layers.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
DROPOUT = 0.1


class LossMismatch(RuntimeError):
    """Two models that should compute the same do not: their times would mean nothing."""


def bench_step(size: Size, rounds: int, say: Say, commit: str | None = None) -> dict[str, Any]:
    """Times by turns in this process, JSON-ready. size: its dropout is not heeded. commit: see
    environment().

    Raises LossMismatch where the packed model's losses, without dropout, are not the padded one's.
    """
    say("building models")
    workload = Workload(dataclasses.replace(size, dropout=DROPOUT))
    padded, packed = workload.padded, workload.packed
    say("comparing losses")
    error = _check_losses(workload, TOLERANCES[size.precision])
    padded.train()
    packed.train()
    steps = {
        "transformers": _transformers(workload),
        "fastmtl sum": _joint(workload),
        "fastmtl pcgrad": _pcgrad(workload),
        "matrix products": _products(workload),
    }
    torch.manual_seed(SEED)
    say("warm-up")
    for step in steps.values():
        step()
    samples = interleave(steps, rounds, say, workload.device)
    found = {name: summary(seconds) for name, seconds in samples.items()}
    for entry in found.values():
        entry["ratio_to_transformers"] = entry["median_s"] / found["transformers"]["median_s"]
        entry["ratio_to_products"] = entry["median_s"] / found["matrix products"]["median_s"]
    return {
        "benchmark": "step",
        "environment": environment(workload.device, commit),
        "shape": dataclasses.asdict(size.shape),
        "precision": size.precision,
        "tasks": workload.tasks,
        "rounds": rounds,
        "dropout": DROPOUT,
        "tokens": workload.packed_batch.num_tokens,
        "padded_tokens": workload.num_padded,
        "loss_error": error,
        "steps": found,
    }


@torch.no_grad()
def _check_losses(workload: Workload, tolerance: float) -> float:
    padded, packed = workload.padded.eval(), workload.packed.eval()
    largest = 0.0
    for task, (loss_sum, count) in enumerate(packed(workload.packed_batch).values()):
        batch = workload.padded_batches[task]
        expected = padded.loss(task, padded.features(batch), batch)
        error = float((loss_sum / count - expected).abs() / expected.abs())
        if not error <= tolerance:
            raise LossMismatch(f"the loss of task {task} is off by {error:.1e}, allowed {tolerance:.1e}")
        largest = max(largest, error)
    return largest


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def _transformers(workload: Workload) -> Callable[[], None]:
    """One padded batch of each task, the sum of their losses, as a plain loop has it."""
    model, batches = workload.padded, workload.padded_batches
    optimizer = _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        for task, batch in enumerate(batches):
            model.loss(task, model.features(batch), batch).backward()
        optimizer.step()

    return step


def _joint(workload: Workload) -> Callable[[], None]:
    model, batch = workload.packed, workload.packed_batch
    optimizer = _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([loss_sum / count for loss_sum, count in model(batch).values()]).sum().backward()
        optimizer.step()

    return step


def _pcgrad(workload: Workload) -> Callable[[], None]:
    model, batch = workload.packed, workload.packed_batch
    optimizer = _optimizer(model)
    surgery = GradientSurgery(
        optimizer,
        tasks=model.recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        seed=SEED,
    )

    def step() -> None:
        optimizer.zero_grad()
        surgery.run([batch], lambda batch, task_grads: model(batch, task_grads))
        optimizer.step()

    return step


def _products(workload: Workload) -> Callable[[], None]:
    """Forward and both backward products of every linear layer of the encoder on the real tokens, into buffers that are
    there. Attention's own are left out: 1 to 2 % at these lengths.
    """
    rows, like = workload.packed_batch.num_tokens, {"device": workload.device, "dtype": workload.dtype}
    weights = [module.weight.detach() for module in workload.packed.encoder.modules() if isinstance(module, nn.Linear)]
    widths = {size for weight in weights for size in weight.shape}
    inputs = {width: torch.randn(rows, width, **like) for width in widths}  # type: ignore[call-overload]
    outputs = {width: torch.empty(rows, width, **like) for width in widths}  # type: ignore[call-overload]
    gradients: dict[torch.Size, Tensor] = {weight.shape: torch.empty_like(weight) for weight in weights}

    def step() -> None:
        for weight in weights:
            wide, narrow = weight.shape
            torch.mm(inputs[narrow], weight.t(), out=outputs[wide])
            torch.mm(inputs[wide], weight, out=outputs[narrow])
            torch.mm(inputs[wide].t(), inputs[narrow], out=gradients[weight.shape])

    return step
