"""One-pass task gradients of the packed model for any batch, against T backward passes in float64.

Tasks: 1 to 8 of every kind, some without rows; sequences down to one token; every adapter;
accumulation; every storage.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loads import ADAPTERS, LORAS, Load, jacobian, make_batches, make_model, merge
from torch import Tensor

from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods.order import draw_order

LOADS = st.builds(
    Load,
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any).map(tuple),
    adapter=st.sampled_from(ADAPTERS + LORAS),
    accumulation=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
)


def surgery_gradients(
    model: MultiTaskModel, load: Load, storage: Any, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return `.grad`, G over its norms, and the norms."""
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1),
        tasks=load.tasks,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=storage,
        dtype=dtype,
        task_weights=model.task_weights,
        seed=3,
    )
    batches = make_batches(load, load.accumulation)
    info = surgery.run(batches, lambda b, task_grads: model(b, task_grads), load.counts())
    assert info.cosines is not None and info.task_norms is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, info.cosines, info.task_norms


# Random weights can make a gradient ill-conditioned. The error of torch's own float32 backward
# passes is one draw of such an error: four times as much is allowed, and always 1e-5 of the
# gradient.
MARGIN = 4


@pytest.mark.slow(10)
@settings(max_examples=60, deadline=None)
@example(load=Load((0, 2, 1, 0, 0, 0, 0, 0), "low_rank+layer", 1, 678), storage="stacked")
@given(load=LOADS, storage=st.sampled_from(["stacked", "kept", "replay"]))
def test_equals_separate_backward_passes_in_float64(load: Load, storage: Any) -> None:
    model = make_model(load)
    rows, own = jacobian(make_model(load).double(), load)
    plain_rows, plain_own = jacobian(make_model(load), load)
    grads, cosines, norms = surgery_gradients(model, load, storage)
    expected_norms = rows.norm(dim=1)
    allowed = torch.maximum(1e-5 * expected_norms, MARGIN * (plain_rows - rows).norm(dim=1))
    there = torch.tensor([count > 0 for count in load.rows])
    assert (norms[~there] == 0).all() and cosines[~there].isnan().all()
    assert ((norms.double() - expected_norms).abs() <= allowed).all()
    expected_cosines = (rows @ rows.T / expected_norms[:, None] / expected_norms[None, :])[there][:, there]
    shares = (allowed / expected_norms)[there]
    assert ((cosines[there][:, there].double() - expected_cosines).abs() <= shares[:, None] + shares[None, :]).all()
    update, weights = merge(rows, draw_order(len(load.rows), 3, 1))
    shared = [n for n, p in model.named_parameters() if any(p is s for s in model.shared_parameters())]
    found = torch.cat([grads[name].flatten().double() for name in shared])
    assert (found - update).norm() <= float((weights.abs() * allowed).sum())
    for name, value in own.items():
        difference = grads[name].double() - value if name in grads else value
        plain = float((plain_own[name] - value).norm())
        assert difference.norm() <= max(1e-5 * max(1.0, float(value.norm())), MARGIN * plain)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    load=LOADS.filter(lambda load: load.accumulation == 1),
    storage=st.sampled_from(["stacked", "stacked in bfloat16", "kept", "replay"]),
)
def test_bfloat16_within_twice_the_error_of_torch(load: Load, storage: Any) -> None:
    exact, _ = jacobian(make_model(load).bfloat16().double(), load)
    plain, _ = jacobian(make_model(load).bfloat16(), load)
    storage, _, narrow = storage.partition(" in ")
    dtype = torch.bfloat16 if narrow else torch.float32
    _, cosines, norms = surgery_gradients(make_model(load).bfloat16(), load, storage, dtype)
    there = [t for t, count in enumerate(load.rows) if count]
    assert torch.isfinite(norms).all()
    for i in there:
        for j in there:
            size = exact[i].norm() * exact[j].norm()
            theirs = (plain[i] @ plain[j] - exact[i] @ exact[j]).abs() / size
            ours = (cosines[i, j] * norms[i] * norms[j] - exact[i] @ exact[j]).abs() / size
            # One draw of torch's error may be small by chance, so the size of the rounding is
            # always allowed.
            assert ours <= 2 * theirs + 2**-6


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_meets_a_task_without_rows_and_one_token_sequences(adapter: str) -> None:
    for storage in ("stacked", "kept", "replay"):
        load = Load((3, 0, 2, 1), adapter, 1, 4)
        rows, _ = jacobian(make_model(load).double(), load)
        _, cosines, norms = surgery_gradients(make_model(load), load, storage)
        assert norms[1] == 0 and cosines[1].isnan().all()
        torch.testing.assert_close(norms.double(), rows.norm(dim=1), rtol=1e-5, atol=0)
