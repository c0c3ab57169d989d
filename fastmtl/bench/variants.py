"""Variants of a step that computes gradients: fastmtl's, the textbook loop, and TorchJD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastmtl.bench import textbook, torchjd_steps
from fastmtl.bench.recordings import STEPS_TO_RECORD, refuse_unrecorded
from fastmtl.bench.sizes import SEED
from fastmtl.bench.workload import Workload, twin
from fastmtl.cuda_graphs.install import install_cuda_graphs
from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.cuda_graphs.recorder import Recorder
from fastmtl.measure.harness import Skipped
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.checks import Storage
from fastmtl.surgery.methods.order import draw_order

# Largest error of a gradient, relative to the task gradients' norms; the error of a model in lower
# precision is added to it. float32: numbers are added in another order. bfloat16: every number of J
# has 8 bits. Peers: PCGrad's coefficients are made of inner products, and torch's inner products of
# 10^8 float32 numbers may be off by a percent on CPUs.
FLOAT32, BFLOAT16, PEER = 1e-5, 2.0**-8, 1e-2


@dataclass(frozen=True)
class Variant:
    """One way to compute the gradients of a step.

    step: runs forward, backward and surgery, and leaves the merged gradients in `.grad` of `model`.
    order: int64 [T, T], the projection order of the first step after torch.manual_seed(SEED); None
    if the gradients are summed. tolerance: the largest relative error of a gradient. peer: True if
    the textbook loop or another library computes the step. optional: True if the step may fail for
    reasons outside fastmtl; it is skipped then. gram: float64 [T, T], the Gramian that PCGrad gets;
    None for that of the task gradients.
    """

    name: str
    model: nn.Module
    step: Callable[[], object]
    order: Tensor | None
    tolerance: float = FLOAT32
    peer: bool = False
    optional: bool = False
    gram: Tensor | None = None


def build(name: str, workload: Workload) -> Variant:
    """Build the variant of this name. Raise Skipped if it cannot run here."""
    return BUILDERS[name](name, workload)


def _autograd(name: str, workload: Workload) -> Variant:
    model, batch = workload.packed, workload.packed_batch

    def step() -> None:
        model.zero_grad()
        torch.stack([loss_sum / count for loss_sum, count in model(batch).values()]).sum().backward()

    return Variant(name, model, step, None, summed_tolerance(workload.dtype))


def _surgery(method: str, storage: Storage = "stacked", dtype: torch.dtype = torch.float32) -> Callable[..., Variant]:
    def build(name: str, workload: Workload) -> Variant:
        model = workload.packed
        step = _step_of(workload, model, _surgery_of(model, method, storage, dtype))
        return _variant(name, workload, model, step, method, dtype)

    return build


def _surgery_of(
    model: MultiTaskModel,
    method: str,
    storage: Storage = "stacked",
    dtype: torch.dtype = torch.float32,
    *,
    cuda_graphs: bool = False,
) -> GradientSurgery:
    return GradientSurgery(
        torch.optim.SGD(model.parameters()),
        method,
        tasks=model.recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=storage,
        dtype=dtype,
        seed=SEED,
        cuda_graphs=record_merging if cuda_graphs else False,
    )


def _step_of(workload: Workload, model: MultiTaskModel, surgery: GradientSurgery) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        surgery.run([workload.packed_batch], lambda batch, task_grads: model(batch, task_grads))

    return step


def _variant(
    name: str,
    workload: Workload,
    model: MultiTaskModel,
    step: Callable[[], object],
    method: str,
    dtype: torch.dtype,
) -> Variant:
    if method == "sum":
        return Variant(name, model, step, None, summed_tolerance(workload.dtype))
    rounds = dtype == torch.bfloat16 and workload.dtype != dtype  # J is rounded to bfloat16, the model is not
    return Variant(name, model, step, draw_order(workload.tasks, SEED, 1), BFLOAT16 if rounds else FLOAT32)


def _recorded(method: str, dtype: torch.dtype = torch.float32) -> Callable[..., Variant]:
    """Return a builder of a variant that replays CUDA graphs.

    The variant's model shares the memory of its weights with the other models.
    """

    def build(name: str, workload: Workload) -> Variant:
        if workload.device.type != "cuda":
            raise Skipped(f"CUDA graphs need an NVIDIA GPU, the model is on {workload.device.type}")
        return recorded(name, workload, method, dtype)

    return build


def recorded(
    name: str, workload: Workload, method: str, dtype: torch.dtype = torch.float32, recorder: Recorder | None = None
) -> Variant:
    """Build a variant, and run the steps that record its CUDA graphs.

    The variant's next step replays the graphs, with the projection order of a first step. recorder:
    replaces CUDA graphs, on any device. Raises Skipped, with the reasons, if a part is not
    recorded.
    """
    model = workload.recomputing("none")
    install_cuda_graphs(model, recorder)
    surgery = _surgery_of(model, method, dtype=dtype, cuda_graphs=True)
    if recorder is not None:
        surgery.record_with(partial(record_merging, recorder=recorder))
    step, state = _step_of(workload, model, surgery), surgery.state_dict()
    for _ in range(STEPS_TO_RECORD):
        step()
    refuse_unrecorded(model, surgery)
    surgery.load_state_dict(state)
    return _variant(name, workload, model, step, method, dtype)


def _textbook(name: str, workload: Workload) -> Variant:
    model, batches = workload.padded, workload.padded_batches
    return Variant(name, model, lambda: textbook.step(model, batches), global_order(workload.tasks), PEER, peer=True)


def _torchjd(name: str, workload: Workload) -> Variant:
    model, batches = workload.padded, workload.padded_batches
    step = torchjd_steps.autojac(model, lambda: [model.features(batch) for batch in batches], batches)
    return Variant(name, model, step, global_order(workload.tasks), PEER, peer=True, optional=True)


def _autogram(name: str, workload: Workload) -> Variant:
    model, batches = twin(workload.padded), workload.padded_batches
    step = torchjd_steps.autogram(model, lambda: [model.features(batch) for batch in batches], batches)
    return Variant(name, model, step, global_order(workload.tasks), PEER, peer=True, optional=True)


JOINT = ("autograd", "sum")
# Bytes per number of J, for the variants that store J.
STACKED = {
    "pcgrad stacked": 4,
    "pcgrad stacked bf16": 2,
    "pcgrad, CUDA graphs": 4,
    "pcgrad bf16, CUDA graphs": 2,
}
BUILDERS: dict[str, Callable[[str, Workload], Variant]] = {
    "autograd": _autograd,
    "sum": _surgery("sum"),
    "pcgrad stacked": _surgery("pcgrad"),
    "pcgrad stacked bf16": _surgery("pcgrad", dtype=torch.bfloat16),
    "pcgrad kept": _surgery("pcgrad", storage="kept"),
    "pcgrad replay": _surgery("pcgrad", storage="replay"),
    "sum, CUDA graphs": _recorded("sum"),
    "pcgrad, CUDA graphs": _recorded("pcgrad"),
    "pcgrad bf16, CUDA graphs": _recorded("pcgrad", dtype=torch.bfloat16),
    "textbook": _textbook,
    "torchjd": _torchjd,
    "torchjd autogram": _autogram,
}


def summed_tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance of one backward of all tasks' losses.

    In bfloat16 on CPUs, this backward adds the rows of all tasks to one rounded sum for each word.
    The textbook loop adds only the rows of one task to a sum, so it rounds differently.
    """
    return FLOAT32 if dtype == torch.float32 else PEER


def global_order(tasks: int) -> Tensor:
    """Return the projection order that the textbook and TorchJD draw after a manual_seed(SEED).

    int64 [T, T]: one permutation per task from the global generator.
    """
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])
