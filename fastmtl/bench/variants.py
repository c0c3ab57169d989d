"""The ways to make one step's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmtl.bench import textbook
from fastmtl.bench.harness import Skipped
from fastmtl.bench.sizes import SEED
from fastmtl.bench.workload import Workload
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods import draw_order
from fastmtl.surgery.options import Storage

# Largest error relative to the task gradients' norms, beside what a model in lower precision is off itself. float32:
# other orders of addition. bfloat16: 8 bits of every number of J. Peers: PCGrad's coefficients are made of inner
# products, and torch's of 10^8 float32 numbers may be off by a percent on CPUs.
FLOAT32, BFLOAT16, PEER = 1e-5, 2.0**-8, 1e-2


@dataclass(frozen=True)
class Variant:
    """step: forward, backward and surgery, from no gradients to merged ones in `.grad` of `model`.

    order: int64 [T, T], how the tasks meet in the first step after torch.manual_seed(SEED); None: gradients are summed.
    peer: no step of fastmtl's. optional: it may fail in ways that are not ours, and is left out then.
    """

    name: str
    model: nn.Module
    step: Callable[[], object]
    order: Tensor | None
    tolerance: float = FLOAT32
    peer: bool = False
    optional: bool = False


def build(name: str, workload: Workload) -> Variant:
    """Raises Skipped where a package is missing."""
    return BUILDERS[name](name, workload)


def _autograd(name: str, workload: Workload) -> Variant:
    model, batch = workload.packed, workload.packed_batch

    def step() -> None:
        model.zero_grad()
        torch.stack([loss_sum / count for loss_sum, count in model(batch).values()]).sum().backward()

    return Variant(name, model, step, None, _summed(workload))


def _surgery(method: str, storage: Storage = "stacked", dtype: torch.dtype = torch.float32) -> Callable[..., Variant]:
    def build(name: str, workload: Workload) -> Variant:
        model, batch = workload.packed, workload.packed_batch
        surgery = GradientSurgery(
            torch.optim.SGD(model.parameters()),
            method,
            tasks=model.recipe.task_names,
            shared=model.shared_parameters(),
            sparse=model.sparse_parameters(),
            storage=storage,
            dtype=dtype,
            seed=SEED,
        )

        def step() -> None:
            model.zero_grad()
            surgery.run([batch], lambda batch, task_grads: model(batch, task_grads))

        if method == "sum":
            return Variant(name, model, step, None, _summed(workload))
        order = draw_order(workload.tasks, SEED, 1)
        rounds = dtype == torch.bfloat16 and workload.dtype != dtype  # J more than the model does
        return Variant(name, model, step, order, BFLOAT16 if rounds else FLOAT32)

    return build


def _textbook(name: str, workload: Workload) -> Variant:
    model, batches = workload.padded, workload.padded_batches
    return Variant(name, model, lambda: textbook.step(model, batches), _global_order(workload.tasks), PEER, peer=True)


def _torchjd(name: str, workload: Workload) -> Variant:
    try:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError as error:
        raise Skipped(f"{error}: pip install 'fastmtl[torchjd]'") from None
    model, batches = workload.padded, workload.padded_batches
    shared = list(model.encoder.parameters())
    own = [list(head.parameters()) for head in model.heads]

    def step() -> None:
        model.zero_grad()
        features = [model.features(batch) for batch in batches]
        losses = [model.loss(task, features[task], batch) for task, batch in enumerate(batches)]
        # One row of the Jacobian at a time is faster here than torch.vmap, for which SDPA's backward has no rule on
        # CPUs.
        mtl_backward(losses, features=features, tasks_params=own, shared_params=shared, parallel_chunk_size=1)
        jac_to_grad(shared, PCGrad())

    return Variant(name, model, step, _global_order(workload.tasks), PEER, peer=True, optional=True)


JOINT = ("autograd", "sum")
STACKED = {"pcgrad stacked": 4, "pcgrad stacked bf16": 2}  # bytes of a number of J
BUILDERS: dict[str, Callable[[str, Workload], Variant]] = {
    "autograd": _autograd,
    "sum": _surgery("sum"),
    "pcgrad stacked": _surgery("pcgrad"),
    "pcgrad stacked bf16": _surgery("pcgrad", dtype=torch.bfloat16),
    "pcgrad replay": _surgery("pcgrad", storage="replay"),
    "textbook": _textbook,
    "torchjd": _torchjd,
}


def _summed(workload: Workload) -> float:
    """The tolerance of a joint backward. In bfloat16 it adds all tasks' rows of a table to one rounded sum on CPUs, the
    loop only one task's.
    """
    return FLOAT32 if workload.dtype == torch.float32 else PEER


def _global_order(tasks: int) -> Tensor:
    """The order of a loop that draws one permutation for each task from the global generator."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])
