"""Every pooling, head and loss in one packed batch: one-pass task gradients against float64 ones.

The float64 gradients are of separate backwards.
"""

from __future__ import annotations

from typing import Any

import choices
import pytest
import torch
from loads import merge
from torch import nn

from fastmtl.model.losses.cached_pairs import cache_pairs
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods.order import draw_order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "storage", "parts"),
    [
        ("pcgrad", "stacked", 1),
        ("pcgrad", "stacked", 2),
        ("pcgrad", "kept", 2),
        ("pcgrad", "replay", 1),
        ("gradvac", "stacked", 2),
        ("sum", "auto", 2),
    ],
)
def test_one_pass_equals_one_backward_per_task(method: str, storage: Any, parts: int) -> None:
    exact = choices.make_model(choices.make_recipe(method)).double()
    rows, own = choices.jacobian(exact, choices.make_batches(exact.recipe, 0, 1)[0])
    recipe = choices.make_recipe(method, cached=parts > 1)
    model = choices.make_model(recipe)
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1),
        method,
        tasks=recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=storage,
        seed=3,
    )
    batches = cache_pairs(model, choices.make_batches(recipe, 0, parts))
    info = surgery.run(batches, lambda b, task_grads: model(b, task_grads), choices.counts(recipe))
    weights = torch.ones(len(rows), dtype=torch.float64)
    if method == "sum":
        assert info.cosines is None
    else:
        assert info.task_norms is not None and info.cosines is not None and info.weights is not None
        norms = rows.norm(dim=1)
        torch.testing.assert_close(info.task_norms.double(), norms, rtol=1e-5, atol=0)
        cosines = rows @ rows.T / norms[:, None] / norms[None, :]
        assert (info.cosines - cosines).abs().max() <= 1e-5
        weights = info.weights.double()
    if method == "pcgrad":
        torch.testing.assert_close(weights, merge(rows, draw_order(len(rows), 3, 1))[1], rtol=1e-4, atol=1e-4)
    grads = {name: p.grad for name, p in model.named_parameters()}
    shared_ids = {id(p) for p in model.shared_parameters()}
    shared = [name for name, p in model.named_parameters() if id(p) in shared_ids]
    found = torch.cat([grads[name].flatten().double() for name in shared])
    assert (found - weights @ rows).norm() <= 1e-5 * float((weights.abs() * rows.norm(dim=1)).sum())
    assert "encoder.pooler.dense.weight" in shared
    names = recipe.task_names  # a bias moves all scores of a row, which changes no loss of theirs
    without_effect = {f"heads.{names.index(task)}.dense.bias" for task in ("which", "listed", "hard")}
    for name, value in own.items():
        assert (value.norm() > 1e-9) == (name not in without_effect), name
        assert (grads[name].double() - value).norm() <= 1e-5 * max(1.0, float(value.norm())), name


def test_everything_stays_in_the_graph_without_rows() -> None:
    """Another rank may have rows under ZeRO 3, and gathers parameters collectively."""
    recipe = choices.make_recipe()
    model = choices.make_model(recipe)
    (batch,) = choices.make_batches(recipe, 0, 1)
    results = model(batch.task(0))
    assert {name: count for name, (_, count) in results.items() if count} == {"max": choices.ROWS}
    sum(loss for loss, _ in results.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        assert not name.startswith("heads.") or name.startswith("heads.0.") or not parameter.grad.any()
    assert model.predict(batch.task(0)).keys() == {"max"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    recipe = choices.make_recipe()
    (batch,) = choices.make_batches(recipe, 0, 1)
    exact, rounded = choices.make_model(recipe), choices.make_model(recipe).to(dtype)
    expected, found = exact(batch), rounded(batch)
    for name, (loss, _) in found.items():
        assert loss.dtype == torch.float32
        assert abs(loss - expected[name][0]) < 0.1 * expected[name][0], name
    sum(loss for loss, _ in found.values()).backward()
    for name, p in rounded.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.dtype == dtype, name


def test_every_module_touches_only_its_own_parameters() -> None:
    """Required by ZeRO 3: a parameter has storage only while its own module runs."""
    recipe = choices.make_recipe(zero=3)
    model = choices.make_model(recipe)
    (batch,) = choices.make_batches(recipe, 0, 1)
    expected = {name: loss.detach() for name, (loss, _) in model(batch).items()}
    kept = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept[parameter]

    def release(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    assert {name: loss.detach() for name, (loss, _) in model(batch).items()} == expected
