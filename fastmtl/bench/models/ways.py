"""The ways to compute the gradients of a step that are compared for a model of another library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    "T passes": _surgery(passes="per_task"),
    "textbook": _textbook,
    "torchjd autojac": _autojac,
    "torchjd autogram": _autogram,
}
