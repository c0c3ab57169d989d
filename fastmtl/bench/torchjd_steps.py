"""Steps of PCGrad by TorchJD: `autojac`, which stores J, and `autogram`, which computes only G.

Both leave the merged gradient of the encoder and each head's own gradient in `.grad`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmtl.bench.textbook import TaskBatch, TaskModel
from fastmtl.measure.harness import Skipped

INSTALL = "pip install 'fastmtl-torch[torchjd]'"
Step = Callable[[], None]
# Runs the forward; returns the features of each task's rows, [B, hidden].
Features = Callable[[], Sequence[Tensor]]


def autojac(model: TaskModel, features_of: Features, batches: Sequence[TaskBatch]) -> Step:
    """Return a step by `mtl_backward` and `jac_to_grad`. Raise Skipped without TorchJD.

    batches: one per task, for the labels.
    """
    try:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError as error:
        raise Skipped(f"{error}: {INSTALL}") from None
    shared = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    own = [list(head.parameters()) for head in model.heads]

    def step() -> None:
        model.zero_grad()
        features = list(features_of())
        # One row of the Jacobian at a time is faster here than torch.vmap, which has no rule for
        # SDPA's backward on CPUs.
        mtl_backward(
            model.losses(features, batches),
            features=features,
            tasks_params=own,
            shared_params=shared,
            parallel_chunk_size=1,
        )
        jac_to_grad(shared, PCGrad())

    return step


def autogram(model: TaskModel, features_of: Features, batches: Sequence[TaskBatch]) -> Step:
    """Return a step by `Engine.compute_gramian` and a backward of the weighted losses.

    The losses are one vector of T objectives (`batch_dim=None`). With `batch_dim=0`, the engine
    would keep a gradient of every parameter for every row, and no module could have an input that
    is the same for all rows. The engine adds hooks to the encoder, so give it a model of its own.
    Raises Skipped without TorchJD.
    """
    try:
        from torchjd.aggregation import PCGradWeighting
        from torchjd.autogram import Engine
    except ImportError as error:
        raise Skipped(f"{error}: {INSTALL}") from None
    engine, weighting = Engine(model.encoder, batch_dim=None), PCGradWeighting()
    own = list(model.heads.parameters())

    def step() -> None:
        model.zero_grad()
        features = list(features_of())
        losses = torch.stack(model.losses(features, batches))
        with warnings.catch_warnings():  # SDPA's backward on CPUs has no rule for vmap, which runs it T times
            warnings.filterwarnings("ignore", message="There is a performance drop")
            weights = weighting(engine.compute_gramian(losses))
        # A weighted loss would weight the heads' gradients, too.
        found = torch.autograd.grad(losses.sum(), [*features, *own])
        for parameter, gradient in zip(own, found[len(features) :], strict=True):
            parameter.grad = gradient
        torch.autograd.backward(features, [w * dy for w, dy in zip(weights, found, strict=False)])

    return step
