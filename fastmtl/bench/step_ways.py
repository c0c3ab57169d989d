"""Implementations of one training step that are compared, all with dropout and AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastmtl.bench.recordings import STEPS_TO_RECORD, refuse_unrecorded
from fastmtl.bench.sizes import SEED
from fastmtl.bench.textbook import PaddedModel
from fastmtl.bench.workload import Workload
from fastmtl.config import Recompute
from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.measure.harness import Skipped
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.checks import Storage
from fastmtl.surgery.methods.table import method_names

TRANSFORMERS, PRODUCTS = "transformers", "matrix products"
COMPILED = ("transformers compiled",)
# Sizes of the adapters: the paper's for PAL, a usual rank for low-rank layers and LoRA.
ADAPTERS = {"pal": 204, "low_rank": 8, "lora": 8}
RECOMPUTE: tuple[Recompute, ...] = ("cheap", "full")
METHODS = ("gradvac", "upgrad", "mgda", "imtlg")
Step = Callable[[], None]


class Way:
    """One implementation of a step.

    build: makes the step from the workload and the model; raises Skipped if it cannot run. model:
    returns the model, whose losses are compared first; None for a step without a loss.
    """

    def __init__(
        self,
        build: Callable[[Workload, nn.Module], Step],
        model: Callable[[Workload], PaddedModel | MultiTaskModel] | None,
    ) -> None:
        self.build, self.model = build, model


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def transformers(workload: Workload, model: nn.Module) -> Step:
    """Return the step of a plain loop: forward and backward of each padded batch, then AdamW."""
    assert isinstance(model, PaddedModel)
    batches, optimizer = workload.padded_batches, _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        for task, batch in enumerate(batches):
            model.loss(task, model.features(batch), batch).backward()
        optimizer.step()

    return step


def _compiled(workload: Workload) -> PaddedModel:
    """Return a copy of the padded model, compiled for any number and length of texts."""
    model = copy.deepcopy(workload.padded)
    model.encoder.compile(dynamic=True)
    return model


def joint(workload: Workload, model: nn.Module) -> Step:
    batch, optimizer = workload.packed_batch, _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([loss_sum / count for loss_sum, count in model(batch).values()]).sum().backward()
        optimizer.step()

    return step


def merged(workload: Workload, model: nn.Module, method: str = "pcgrad", storage: Storage = "stacked") -> Step:
    return _merged(workload, model, method, storage)[0]


def _merged(
    workload: Workload, model: nn.Module, method: str = "pcgrad", storage: Storage = "stacked"
) -> tuple[Step, GradientSurgery]:
    assert isinstance(model, MultiTaskModel)
    if method not in method_names():
        raise Skipped("TorchJD is not installed: pip install 'fastmtl-torch[torchjd]'")
    batch, optimizer = workload.packed_batch, _optimizer(model)
    surgery = GradientSurgery(
        optimizer,
        method,
        tasks=model.recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=storage,
        seed=SEED,
        cuda_graphs=record_merging if model.encoder.recorded is not None else False,
    )

    def step() -> None:
        optimizer.zero_grad()
        surgery.run([batch], lambda batch, task_grads: model(batch, task_grads))
        optimizer.step()

    return step, surgery


def recorded(workload: Workload, model: nn.Module, method: str) -> Step:
    """Return a step of `sum` or `pcgrad` that replays CUDA graphs, as with `engine.cuda_graphs`.

    Raises Skipped, with the reasons, if a part is not recorded.
    """
    assert isinstance(model, MultiTaskModel)
    step, surgery = (joint(workload, model), None) if method == "sum" else _merged(workload, model, method)
    weights = copy.deepcopy(model.state_dict())  # all models share these weights; recording must not change them
    for _ in range(STEPS_TO_RECORD):
        step()
    model.load_state_dict(weights)
    refuse_unrecorded(model, surgery)
    return step


def products(workload: Workload, _: nn.Module | None = None) -> Step:
    """Return a step of the matrix products alone: forward and both backward ones of each Linear.

    The products run on the encoder's linear layers with the real tokens, and write into
    preallocated buffers. Attention's own products are left out; they are 1 to 2 % at these lengths.
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


def _packed(workload: Workload) -> MultiTaskModel:
    return workload.packed


WAYS = {
    TRANSFORMERS: Way(transformers, lambda workload: workload.padded),
    COMPILED[0]: Way(transformers, _compiled),
    "fastmtl sum": Way(joint, _packed),
    "fastmtl pcgrad": Way(merged, _packed),
    PRODUCTS: Way(products, None),
    "fastmtl pcgrad replay": Way(partial(merged, storage="replay"), _packed),
    **{f"fastmtl {method}": Way(partial(merged, method=method), _packed) for method in METHODS},
    **{
        f"fastmtl {method}, recompute {recompute}": Way(build, partial(Workload.recomputing, recompute=recompute))
        for method, build in (("sum", joint), ("pcgrad", merged))
        for recompute in RECOMPUTE
    },
    **{
        f"fastmtl {method}, CUDA graphs": Way(
            partial(recorded, method=method), partial(Workload.recomputing, recompute="none", cuda_graphs=True)
        )
        for method in ("sum", "pcgrad")
    },
    **{
        f"fastmtl sum, {adapter} {size}": Way(joint, partial(Workload.with_adapter, adapter=adapter, size=size))
        for adapter, size in ADAPTERS.items()
    },
}
DEFAULT = (TRANSFORMERS, "fastmtl sum", "fastmtl pcgrad", PRODUCTS)
SWEPT_RECOMPUTE = (
    *DEFAULT[:3],
    *(f"fastmtl {method}, recompute {recompute}" for method in ("sum", "pcgrad") for recompute in RECOMPUTE),
    PRODUCTS,
)
SWEPT_GRAPHS = (*DEFAULT[:3], "fastmtl sum, CUDA graphs", "fastmtl pcgrad, CUDA graphs", PRODUCTS)
SWEPT_METHODS = (*DEFAULT[:3], "fastmtl pcgrad replay", *(f"fastmtl {method}" for method in METHODS), PRODUCTS)
SWEPT_ADAPTERS = (*DEFAULT[:2], *(f"fastmtl sum, {name} {size}" for name, size in ADAPTERS.items()), PRODUCTS)
