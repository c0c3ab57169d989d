"""GradientSurgery on a torch optimiser and the real packed model, against a textbook PCGrad loop in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import TrainingError, UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.methods import draw_order

sys.path.insert(0, str(Path(__file__).parent))
import deepspeed_cases as cases  # noqa: E402

TASKS = ["kind", "same", "degree"]


def make(adapter: str = "pal", dropout: float = 0.0, checkpointing: bool = False) -> MultiTaskModel:
    recipe = cases.make_recipe(cases.Case(1, 1, "pcgrad"))
    recipe.adapter.name = adapter
    model = cases.make_model(recipe)
    model.encoder.checkpointing = checkpointing
    if dropout:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    return model


def batch(part: int = 0, parts: int = 1) -> PackedBatch:
    return cases.step_batches(cases.make_data(), 0, part, parts)


COUNTS = {"kind": 8, "same": 3, "degree": 8}


def gradients(
    model: MultiTaskModel, batches: list[PackedBatch], sink: bool = True, **options: object
) -> dict[str, Tensor]:
    """What `run` leaves in `.grad`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = GradientSurgery(
        optimizer,
        **{
            "method": "pcgrad",
            "tasks": TASKS,
            "shared": model.shared_parameters(),
            "sparse": model.sparse_parameters(),
            "task_weights": model.task_weights,
            "seed": 3,
            **options,
        },
    )
    if sink:
        surgery.run(batches, lambda b, task_grads: model(b, task_grads), COUNTS)
    else:
        surgery.run(batches, lambda b: model(b), COUNTS)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def textbook(model: MultiTaskModel, joined: PackedBatch) -> dict[str, Tensor]:
    """T backwards, flatten, project pair by pair (Yu et al. 2020, Algorithm 1), float64; own gradients are summed."""
    wide = make(model.recipe.adapter.name).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    names = [name for name, _ in wide.named_parameters()]
    shared = [name for name in names if name.startswith("encoder.")]
    rows, own = [], {name: 0 for name in names if name not in shared}
    for t, task in enumerate(TASKS):
        loss_sum, count = wide(joined.task(t))[task]
        loss = wide.task_weights[task] * loss_sum / count
        found = torch.autograd.grad(loss, list(wide.parameters()), allow_unused=True, materialize_grads=True)
        by_name = dict(zip(names, found, strict=True))
        rows.append(torch.cat([by_name[name].flatten() for name in shared]))
        own = {name: own[name] + by_name[name] for name in own}
    order = draw_order(3, seed=3, step=1)
    merged = torch.zeros_like(rows[0])
    for i in range(3):
        row = rows[i].clone()
        for j in order[i].tolist():
            if j != i and row @ rows[j] < 0:
                row -= (row @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        merged += row
    sizes = [dict(wide.named_parameters())[name].numel() for name in shared]
    pieces = dict(zip(shared, merged.split(sizes), strict=True))
    return {**{n: v.view(dict(wide.named_parameters())[n].shape) for n, v in pieces.items()}, **own}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    total = torch.cat([value.flatten().double() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name].double() - value).abs().max() <= bound * total, name


@pytest.mark.parametrize("adapter", ["none", "pal", "low_rank", "lora"])
@pytest.mark.parametrize("storage", ["stacked", "replay"])
def test_pcgrad_equals_the_textbook(adapter: str, storage: str) -> None:
    model = make(adapter)
    assert_same(gradients(model, [batch()], storage=storage), textbook(model, batch()))


def test_there_are_conflicts_to_resolve() -> None:
    """Else the tests around this one would pass with plain sums."""
    model = make()
    merged, summed = gradients(model, [batch()]), gradients(model, [batch()], method="sum")
    assert any((merged[name] - summed[name]).abs().max() > 1e-4 for name in merged)


@pytest.mark.parametrize("storage", ["stacked", "replay"])
@pytest.mark.parametrize("method", ["sum", "pcgrad"])
def test_accumulation_equals_the_joined_batch(storage: str, method: str) -> None:
    model = make()
    joined = gradients(model, [batch()], method=method)
    parts = gradients(model, [batch(part, 4) for part in range(4)], storage=storage, method=method)
    assert_same(parts, {name: value.double() for name, value in joined.items()})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replay_repeats_the_dropout_masks(checkpointing: bool) -> None:
    model = make(dropout=0.1, checkpointing=checkpointing)
    torch.manual_seed(5)
    stacked = gradients(model, [batch(part, 2) for part in range(2)], storage="stacked")
    torch.manual_seed(5)
    replayed = gradients(model, [batch(part, 2) for part in range(2)], storage="replay")
    after = torch.rand(1)
    assert_same(replayed, {name: value.double() for name, value in stacked.items()})
    torch.manual_seed(5)
    gradients(model, [batch(part, 2) for part in range(2)], storage="stacked")
    assert torch.equal(after, torch.rand(1))  # and the next step draws the same


def test_one_backward_per_task_equals_one_pass() -> None:
    model = make()
    assert_same(gradients(model, [batch()], sink=False), textbook(model, batch()))


def test_same_weights_as_torchjd() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    from fastmtl_kernels import pcgrad_weights

    random = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    gram = random @ random.T
    torch.manual_seed(4)
    theirs = torchjd.PCGradWeighting()(gram)
    torch.manual_seed(4)
    torch.testing.assert_close(pcgrad_weights(gram), theirs)


def test_an_absent_task_changes_nothing() -> None:
    model = make()
    info = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", tasks=TASKS, shared=model.shared_parameters()
    ).run([batch(1, 2)], lambda b, task_grads: model(b, task_grads))
    assert set(info.losses) == {"kind", "degree"}
    assert info.cosines is not None and info.cosines[1].isnan().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_bad_arguments() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="Did you mean 'pcgrad'"):
        GradientSurgery(optimizer, "pcgrab", tasks=TASKS)
    with pytest.raises(ValueError, match="storage must be"):
        GradientSurgery(optimizer, tasks=TASKS, storage="stack")
    with pytest.raises(ValueError, match="target"):
        GradientSurgery(model, tasks=TASKS)
    with pytest.raises(ValueError, match="counts"):
        GradientSurgery(optimizer, tasks=TASKS).run([batch(), batch()], lambda b: model(b))
    with pytest.raises(ValueError, match="losses of other"):
        GradientSurgery(optimizer, tasks=["other2"]).run([0], lambda b: {"other": (torch.zeros(()), 1)})


def test_a_gradient_that_is_not_finite_skips_and_five_stop() -> None:
    model = make()
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, shared=model.shared_parameters()
    )

    def loss_fn(b: PackedBatch, task_grads: object) -> dict[str, tuple[Tensor, int]]:
        losses = model(b, task_grads)
        return {**losses, "degree": (losses["degree"][0] * float("inf"), 8)}

    for _ in range(4):
        assert surgery.run([batch()], loss_fn).skipped is not None
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TrainingError, match="lower optimizer.lr"):
        surgery.run([batch()], loss_fn)
    state = surgery.state_dict()
    assert state["skipped"] == 5


def test_order_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(draw_order(4, 1, 7), draw_order(4, 1, 7))
    assert any(not torch.equal(draw_order(4, 1, 7), draw_order(4, seed, step)) for seed, step in ((2, 7), (1, 8)))
    assert sorted(draw_order(4, 1, 7)[2].tolist()) == [0, 1, 2, 3]
