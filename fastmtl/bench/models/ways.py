"""The ways to compute the gradients of a step that are compared for a model of another library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.bench import textbook, torchjd_steps
from fastmtl.bench.models.workload import ModelWorkload, TrunkModel
from fastmtl.bench.sizes import SEED
from fastmtl.bench.textbook import trained
from fastmtl.bench.variants import FLOAT32, PEER, Variant, global_order, summed_tolerance
from fastmtl.bench.workload import twin
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.attach.sites import large_tables
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.methods.order import draw_order

JOINT = "joint"
# The ways that store J, in float32.
STACKED = ("one pass", "T passes")


def build(name: str, workload: ModelWorkload) -> Variant:
    """Build the variant of this name. Raise Skipped if it cannot run here."""
    return WAYS[name](name, workload)


def _joint(name: str, workload: ModelWorkload) -> Variant:
    model = workload.padded

    def step() -> None:
        model.zero_grad()
        torch.stack(model.losses(workload.features(model), workload.padded_batches)).sum().backward()

    return Variant(name, model, step, None, summed_tolerance(workload.dtype))


def _surgery(**options: Any) -> Callable[[str, ModelWorkload], Variant]:
    """Return a builder of a variant of GradientSurgery(..., model=..., **options).

    With one pass and with T passes, J has only the rows in use of large tables. `verify_every` is
    0, since the oracle checks the gradients.
    """

    def build(name: str, workload: ModelWorkload) -> Variant:
        model, batches = twin(workload.padded), workload.padded_batches
        counts = dict(zip(workload.names, workload.counts, strict=True))
        rows = {tuple(workload.names): workload.counts[0]} if workload.same_rows else counts
        surgery = GradientSurgery(
            torch.optim.SGD(trained(model)),
            "pcgrad",
            tasks=workload.names,
            model=model.encoder,
            sparse=large_tables(model.encoder, trained(model.encoder)),
            verify_every=0,
            seed=SEED,
            **options,
        )

        def losses_of(_: object) -> Losses:
            with surgery.rows(rows):
                means = model.losses(workload.features(model), batches)
            return {name: (mean * count, count) for (name, count), mean in zip(counts.items(), means, strict=True)}

        def step() -> None:
            model.zero_grad()
            surgery.run([None], losses_of)

        return Variant(name, model, step, draw_order(workload.tasks, SEED, 1), FLOAT32)

    return build


def _features(name: str, workload: ModelWorkload) -> Variant:
    """Build surgery on the gradients of the trunk's output, for which nothing is attached.

    Without a conflict in the output, the result is the sum. With one loss per row there is none.
    """
    model, batches, names = twin(workload.padded), workload.padded_batches, workload.names
    shared = trained(model.encoder)
    surgery = GradientSurgery(torch.optim.SGD(trained(model)), "pcgrad", tasks=names, shared=shared, seed=SEED)

    def losses_of(_: object) -> tuple[Losses, Tensor]:
        hidden = model.hidden(workload.joint)
        means = model.losses(workload.of_tasks(hidden), batches)
        losses = zip(names, means, workload.counts, strict=True)
        return {name: (mean * count, count) for name, mean, count in losses}, hidden

    def step() -> None:
        model.zero_grad()
        surgery.run([None], losses_of, features=True)

    gram = _gramian_of_features(workload)
    if not (gram < 0).any():
        return Variant(name, model, step, None, summed_tolerance(workload.dtype))
    return Variant(name, model, step, draw_order(workload.tasks, SEED, 1), FLOAT32, gram=gram)


def _gramian_of_features(workload: ModelWorkload) -> Tensor:
    """Return float64 [T, T], the inner products of the tasks' gradients of the hidden states."""
    model = workload.padded
    with torch.no_grad():
        hidden = model.hidden(workload.joint)
    hidden.requires_grad_()
    losses = model.losses(workload.of_tasks(hidden), workload.padded_batches)
    rows = torch.stack([torch.autograd.grad(loss, hidden)[0].flatten() for loss in losses]).double()
    return (rows @ rows.t()).cpu()


def _textbook(name: str, workload: ModelWorkload) -> Variant:
    model, batches = workload.padded, workload.padded_batches
    features = (lambda: workload.features(model)) if workload.same_rows else None
    return _peer(name, workload, model, lambda: textbook.step(model, batches, features))


def _autojac(name: str, workload: ModelWorkload) -> Variant:
    model = workload.padded
    step = torchjd_steps.autojac(model, lambda: workload.features(model), workload.padded_batches)
    return _peer(name, workload, model, step, optional=True)


def _autogram(name: str, workload: ModelWorkload) -> Variant:
    model = twin(workload.padded)
    step = torchjd_steps.autogram(model, lambda: workload.features(model), workload.padded_batches)
    return _peer(name, workload, model, step, optional=True)


def _peer(
    name: str, workload: ModelWorkload, model: TrunkModel, step: Callable[[], None], *, optional: bool = False
) -> Variant:
    return Variant(name, model, step, global_order(workload.tasks), PEER, peer=True, optional=optional)


WAYS: dict[str, Callable[[str, ModelWorkload], Variant]] = {
    JOINT: _joint,
    "one pass": _surgery(),
    "replay": _surgery(storage="replay"),
    "features": _features,
    "T passes": _surgery(passes="per_task"),
    "textbook": _textbook,
    "torchjd autojac": _autojac,
    "torchjd autogram": _autogram,
}
