"""GradientSurgery on a torch optimiser and the packed model, against a float64 PCGrad loop."""

from __future__ import annotations

import json
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any
from weakref import ref

import deepspeed_cases as cases
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fastmtl.config import AdapterConfig, Recompute
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import TrainingError, UserError
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery, SurgeryInfo, gradient_surgery
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.targets.engine import EngineTarget
from fastmtl.surgery.targets.optimizer import OptimizerTarget
from fastmtl.surgery.targets.surrogate import Surrogate
from fastmtl_kernels import gradvac_weights

TASKS = ["kind", "same", "degree"]


def make(adapter: str = "pal", dropout: float = 0.0, recompute: Recompute = "none") -> MultiTaskModel:
    recipe = cases.make_recipe(cases.Case(1, 1, "pcgrad"))
    recipe.adapter = AdapterConfig(name=adapter, size=8, heads=2)
    model = cases.make_model(recipe)
    assert isinstance(model.encoder, PackedEncoder)
    model.encoder.recompute = recompute
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
    model: MultiTaskModel, batches: list[PackedBatch], sink: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Return `.grad` after `run`."""
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
    """Return float64 PCGrad: T backwards, projected pair by pair; own gradients are summed.

    Yu et al. 2020, Algorithm 1.
    """
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
@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
def test_pcgrad_equals_the_textbook(adapter: str, storage: Any) -> None:
    model = make(adapter)
    assert_same(gradients(model, [batch()], storage=storage), textbook(model, batch()))


def test_there_are_conflicts_to_resolve() -> None:
    """The tests around this one would pass with plain sums if there were no conflicts."""
    model = make()
    merged, summed = gradients(model, [batch()]), gradients(model, [batch()], method="sum")
    assert any((merged[name] - summed[name]).abs().max() > 1e-4 for name in merged)


@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
@pytest.mark.parametrize("method", ["sum", "pcgrad"])
def test_accumulation_equals_the_joined_batch(storage: Any, method: str) -> None:
    model = make()
    joined = gradients(model, [batch()], method=method)
    parts = gradients(model, [batch(part, 4) for part in range(4)], storage=storage, method=method)
    assert_same(parts, {name: value.double() for name, value in joined.items()})


@pytest.mark.parametrize("storage", ["none", "stacked", "kept", "replay"])
def test_recomputation_changes_no_bit(storage: Any) -> None:
    """Joint training, and PCGrad with every storage; forward counts a weight's uses."""
    options = {"method": "sum"} if storage == "none" else {"storage": storage}
    found = []
    for recompute in ("none", "cheap", "full"):
        torch.manual_seed(5)
        found.append(gradients(make(dropout=0.1, recompute=recompute), [batch(), batch()], **options))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) and torch.equal(gradient, found[2][name]), name


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_replay_repeats_the_dropout_masks(recompute: Recompute) -> None:
    model = make(dropout=0.1, recompute=recompute)
    torch.manual_seed(5)
    stacked = gradients(model, [batch(part, 2) for part in range(2)], storage="stacked")
    torch.manual_seed(5)
    replayed = gradients(model, [batch(part, 2) for part in range(2)], storage="replay")
    after = torch.rand(1)
    assert_same(replayed, {name: value.double() for name, value in stacked.items()})
    torch.manual_seed(5)
    gradients(model, [batch(part, 2) for part in range(2)], storage="stacked")
    assert torch.equal(after, torch.rand(1))  # the next step draws the same numbers


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_a_forward_begins_without_the_graph_of_the_one_before(method: str) -> None:
    """The previous graph would bring nodes of the default stream into a capture."""
    model = make()
    seen: list[Any] = []

    def loss_fn(micro_batch: PackedBatch, task_grads: Sink) -> Losses:
        assert all(loss() is None for loss in seen)
        losses = model(micro_batch, task_grads)
        seen.extend(ref(loss) for loss, _ in losses.values())
        return losses

    options = {"tasks": TASKS, "shared": model.shared_parameters(), "sparse": model.sparse_parameters()}
    surgery = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), method, **options)  # type: ignore[arg-type]
    for _ in range(2):
        surgery.run([batch(0, 2), batch(1, 2)], loss_fn, COUNTS)
    assert len(seen) == 4 * len(TASKS)


def test_one_backward_per_task_equals_one_pass() -> None:
    model = make()
    assert_same(gradients(model, [batch()], sink=False), textbook(model, batch()))


@pytest.mark.parametrize("reduce", ["exact", "sketch"])
def test_a_shared_scalar(reduce: Any) -> None:
    """A parameter without dimensions, such as the gain of a gate."""
    scale = nn.Parameter(torch.tensor(2.0))
    surgery = GradientSurgery(torch.optim.SGD([scale], lr=0.1), tasks=["a", "b"], reduce=reduce)
    info = surgery.backward({"a": (scale.square(), 1), "b": (-scale, 1)})
    assert info is not None and scale.grad is not None and scale.grad.shape == ()
    assert scale.grad == 0  # each of the gradients 4 and -1 is projected to zero by the other


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
        GradientSurgery(optimizer, tasks=TASKS, storage="stack")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target"):
        GradientSurgery(model, tasks=TASKS)
    with pytest.raises(ValueError, match="counts"):
        GradientSurgery(optimizer, tasks=TASKS).run([batch(), batch()], lambda b: model(b))
    with pytest.raises(UserError, match="same has 3 rows in one micro-batch, counts gives it 2"):
        GradientSurgery(optimizer, tasks=TASKS).run([batch()], lambda b: model(b), {**COUNTS, "same": 2})
    with pytest.raises(UserError, match="no loss was given"):
        GradientSurgery(optimizer, tasks=TASKS).run([batch()], lambda b: {})
    with pytest.raises(UserError, match="dtype must be"):
        GradientSurgery(optimizer, tasks=TASKS, dtype=torch.float16)
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


@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
def test_a_model_that_goes_past_the_sink_is_refused(storage: Any) -> None:
    """Its gradient would otherwise be lost silently."""
    model = make()
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, shared=model.shared_parameters(), storage=storage
    )
    with pytest.raises(UserError, match="model does not use it"):
        surgery.run([batch()], lambda b, task_grads: model(b))

    def tied(b: PackedBatch, task_grads: object) -> dict[str, tuple[Tensor, int]]:
        losses = model(b, task_grads)
        penalty = model.encoder.embeddings.word_embeddings.weight.square().sum()
        return {**losses, "kind": (losses["kind"][0] + penalty, losses["kind"][1])}

    with pytest.raises(UserError, match="does not write into task_grads"):
        surgery.run([batch()], tied)
    assert all(p.grad is None for p in model.parameters())


class Scaled(OptimizerTarget):
    """A target with a loss scale, like fp16 under DeepSpeed."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.merged: dict[int, Tensor] = {}

    def loss_scale(self) -> float:
        return 1024.0

    def backs_off(self) -> bool:
        return True

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.loss_scale()).backward()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self.loss_scale()

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        self.merged = dict(gradients)
        super().hand_over(gradients, reached)


@pytest.mark.parametrize(
    ("fp16", "own_scale", "scales"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_gradients_stay_float32_until_a_loss_scale_has_come(fp16: bool, own_scale: bool, scales: bool) -> None:
    target = EngineTarget.__new__(EngineTarget)
    target.engine = SimpleNamespace(fp16_enabled=lambda: fp16, optimizer=SimpleNamespace(custom_loss_scaler=own_scale))
    assert target.wants_float32() == scales


def test_merged_gradients_become_grad_without_a_copy() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
    flat = torch.arange(10.0)
    merged = [flat[:6].view(2, 3), flat[6:]]
    Surrogate.apply(merged, 1.0, *parameters).backward(torch.tensor(2.0))
    assert parameters[0].grad is not None and parameters[0].grad.data_ptr() == flat.data_ptr()
    for parameter, expected in zip(parameters, (torch.arange(6.0).view(2, 3), torch.arange(6.0, 10.0)), strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        assert torch.equal(parameter.grad.float(), 2 * expected)
        parameter.grad = None
    narrow = torch.arange(10.0).bfloat16()
    Surrogate.apply([flat[:6].view(2, 3), narrow[6:]], None, *parameters).backward(torch.tensor(2.0))
    assert parameters[1].grad is not None and parameters[1].grad.data_ptr() == narrow[6:].data_ptr()
    assert torch.equal(parameters[1].grad.float(), torch.arange(6.0, 10.0))  # no scale is applied


@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
def test_a_loss_scale_changes_nothing(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    expected = {name: value.double() for name, value in gradients(model, [batch()]).items()}
    monkeypatch.setattr(gradient_surgery, "find_target", Scaled)
    assert_same(gradients(model, [batch()], storage=storage), expected)


@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
def test_an_overflow_reaches_the_loss_scaler(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_surgery, "find_target", Scaled)
    model = make()
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, shared=model.shared_parameters(), storage=storage
    )

    def loss_fn(b: PackedBatch, task_grads: object) -> dict[str, tuple[Tensor, int]]:
        losses = model(b, task_grads)
        return {**losses, "degree": (losses["degree"][0] * float("inf"), 8)}

    for _ in range(6):  # more than the number of skipped steps that stops a run
        info = surgery.run([batch()], loss_fn)
        assert info.skipped is None and info.cosines is None  # so the loop calls step(), which lowers the scale
    assert surgery.state_dict()["skipped"] == 0
    assert not all(p.grad.isfinite().all() for p in model.shared_parameters() if p.grad is not None)


def test_gradvac_carries_its_targets_over_steps_and_checkpoints() -> None:
    model = make()

    def surgery() -> GradientSurgery:
        return GradientSurgery(
            torch.optim.SGD(model.parameters(), lr=0.1),
            "gradvac",
            tasks=TASKS,
            shared=model.shared_parameters(),
            sparse=model.sparse_parameters(),
            seed=3,
        )

    def run(which: GradientSurgery, part: int) -> SurgeryInfo:
        return which.run([batch(part, 2)], lambda b, task_grads: model(b, task_grads))

    going, target = surgery(), torch.zeros(3, 3)
    for step in range(1, 5):
        info = run(going, step % 2)
        assert info.cosines is not None and info.task_norms is not None and info.weights is not None
        gram = info.cosines.nan_to_num() * info.task_norms[:, None] * info.task_norms[None, :]
        weights, cosines = gradvac_weights(gram, target, order=draw_order(3, 3, step))
        target.lerp_(cosines, 0.01)
        torch.testing.assert_close(info.weights, weights, rtol=1e-4, atol=1e-5)
        if step == 2:
            state = json.loads(json.dumps(going.state_dict()))
    resumed = surgery()
    resumed.load_state_dict(state)
    for step in (3, 4):
        info = run(resumed, step % 2)
    assert resumed.state_dict() == going.state_dict()
    assert target.abs().max() > 0.001


def test_jacobian_in_bfloat16() -> None:
    model = make()
    exact, rounded = textbook(model, batch()), gradients(model, [batch()], dtype=torch.bfloat16)
    error = torch.cat([(rounded[name].double() - value).flatten() for name, value in exact.items()]).norm()
    total = torch.cat([value.flatten() for value in exact.values()]).norm()
    assert 1e-5 * total < error <= 2**-7 * total
    assert all(value.dtype == torch.float32 for value in rounded.values())


class HuggingFace(nn.Module):
    """transformers.BertModel with two heads: another library's layers, one backward per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = BertModel(size, add_pooling_layer=False)
        self.heads = nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
        self.heads[1].load_state_dict(self.heads[0].state_dict())  # equal heads with opposite goals conflict

    def forward(self, ids: Tensor) -> dict[str, tuple[Tensor, int]]:
        first = self.encoder(ids).last_hidden_state[:, 0]
        up, down = (head(first).squeeze(1) for head in self.heads)
        goal = ids[:, 1].to(up.dtype) / 10
        return {"up": ((up - goal).square().sum(), len(ids)), "down": ((down + goal).square().sum(), len(ids))}


@pytest.mark.parametrize("sparse", [False, True])
def test_a_hugging_face_model_equals_the_textbook(sparse: bool) -> None:
    model, ids = HuggingFace(), torch.randint(0, 40, (6, 7), generator=torch.Generator().manual_seed(2))
    wide = HuggingFace().double()
    shared = [p for p in wide.encoder.parameters()]
    rows = []
    for loss, count in wide(ids).values():
        found = torch.autograd.grad(loss / count, shared, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    assert rows[0] @ rows[1] < 0
    one = rows[0] - (rows[0] @ rows[1]) / (rows[1] @ rows[1]) * rows[1]
    two = rows[1] - (rows[0] @ rows[1]) / (rows[0] @ rows[0]) * rows[0]
    expected = (one + two).split([p.numel() for p in shared])
    surgery = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1),
        tasks=["up", "down"],
        shared=list(model.encoder.parameters()),
        sparse=[model.encoder.embeddings.word_embeddings.weight] if sparse else [],  # type: ignore[list-item]
    )
    info = surgery.run([ids], lambda ids: model(ids))
    assert info.conflict_rate == 1.0
    total = (one + two).norm()
    for parameter, truth in zip(model.encoder.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad.flatten().double() - truth).abs().max() <= 1e-5 * total
    own = torch.autograd.grad(sum(loss / count for loss, count in wide(ids).values()), list(wide.heads.parameters()))
    for parameter, truth in zip(model.heads.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_order_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(draw_order(4, 1, 7), draw_order(4, 1, 7))
    assert any(not torch.equal(draw_order(4, 1, 7), draw_order(4, seed, step)) for seed, step in ((2, 7), (1, 8)))
    assert sorted(draw_order(4, 1, 7)[2].tolist()) == [0, 1, 2, 3]
