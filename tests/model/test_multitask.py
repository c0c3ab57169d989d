from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import OptimizerConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.sinks.stack import StackSink

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]

ADAPTERS = [
    {"name": "none"},
    {"name": "pal", "size": 12, "heads": 4},
    {"name": "pal", "size": 12, "heads": 4, "projections": 3},
    {"name": "low_rank", "size": 5},
    {"name": "low_rank", "size": 6, "heads": 2, "top": "layer"},
    {"name": "none", "size": 6, "heads": 2, "top": "pal"},
    {"name": "lora", "size": 3},
]
LENGTHS = [[5, 1, 9], [7, 12], [6, 3, 8, 8]]
PAIRS = [False, False, True]
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: "-".join(map(str, adapter.values())))


def gradients(model: MultiTaskModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@every_adapter
def test_another_tasks_sequences_change_nothing(adapter: dict, make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Task 1 has equal loss and gradients with different, more and no rows of the other tasks."""
    model = make_model(adapter=adapter).eval().double()
    losses, grads = [], []
    for first, last in (([5, 1, 9], [6, 3, 8, 8]), ([11, 2, 4, 13], [5, 5]), ([], [])):
        batch = make_batch([first, [7, 12], last], pairs=PAIRS)
        loss, count = model(batch)["para"]
        assert count == 2
        losses.append(loss.detach())
        grads.append(gradients(model, loss))
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)
        for name, expected in grads[0].items():
            if name.startswith(("encoder.", "adapter.", "heads.1.")):
                torch.testing.assert_close(grad[name], expected, rtol=1e-5, atol=1e-12)


def test_losses_are_sums_over_the_examples(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    predicted = model.predict(batch)
    results = model(batch)
    assert {name: count for name, (_, count) in results.items()} == {"sst": 3, "para": 2, "sts": 2}
    rows = torch.arange(3)
    expected = {
        "sst": -predicted["sst"][rows, batch.labels[0]].log().sum(),
        "para": functional.binary_cross_entropy(predicted["para"], batch.labels[1], reduction="sum"),  # type: ignore[arg-type]
        "sts": ((predicted["sts"] - batch.labels[2]) / 1.25).square().sum(),
    }
    for name, (loss, _) in results.items():
        assert loss.shape == () and loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


def test_pairs_are_two_sequences_of_one_encoder(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """The order of `pairs` determines which sequence is u."""
    model = make_model(tasks=cosine_and_linear()).eval()
    batch = make_batch([[6, 3, 8, 8]], pairs=[True])
    swapped = dataclasses.replace(batch, pairs=(batch.pairs[0].flip(1),))
    crossed = dataclasses.replace(batch, pairs=(torch.tensor([[0, 3], [2, 1]]),))
    scores = model.predict(batch)["sts"]
    torch.testing.assert_close(model.predict(swapped)["sts"], scores)  # a cosine is symmetric
    assert not torch.allclose(model.predict(crossed)["sts"], scores)


def cosine_and_linear() -> dict:
    sts = {"type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean", "head": {"name": "cosine"}}
    return {"sts": {**sts, "data": {}}}


def test_predictions_have_their_shapes_and_draw_no_dropout(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    predicted = model.predict(batch)
    assert predicted["sst"].shape == (3, 5) and predicted["para"].shape == (2,) and predicted["sts"].shape == (2,)
    torch.testing.assert_close(predicted["sst"].sum(1), torch.ones(3))
    assert ((predicted["para"] > 0) & (predicted["para"] < 1)).all()
    assert not predicted["sst"].requires_grad
    again = model.predict(batch)
    assert all(torch.equal(predicted[name], again[name]) for name in predicted)
    unlabelled = dataclasses.replace(batch, labels=(None, None, None))
    assert torch.equal(model.predict(unlabelled)["sst"], predicted["sst"])
    with pytest.raises(ValueError, match="task 'sst': the batch has no labels"):
        model(unlabelled)


def test_absent_tasks_have_no_predictions_and_zero_losses(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(adapter={"name": "pal", "size": 12, "heads": 4}).eval()
    full = make_batch(LENGTHS, pairs=PAIRS)
    alone = full.task(2)
    assert model.predict(alone).keys() == {"sts"}
    assert {name: (loss.item(), count) for name, (loss, count) in model(alone).items() if name != "sts"} == {
        "sst": (0.0, 0),
        "para": (0.0, 0),
    }
    torch.testing.assert_close(model(alone)["sts"], model(full)["sts"])
    torch.testing.assert_close(model.predict(alone)["sts"], model.predict(full)["sts"])
    no_pairs = dataclasses.replace(full.task(0), pairs=(None, None, None))  # as for a model without the other tasks
    torch.testing.assert_close(model.predict(no_pairs)["sst"], model.predict(full)["sst"])
    empty = make_batch([[], [], []], pairs=PAIRS)
    assert model.predict(empty) == {}
    assert all((loss.item(), count) == (0.0, 0) for loss, count in model(empty).values())
    with pytest.raises(UserError, match="tasks.sts.pairs: bi, but its examples are single texts"):
        model(dataclasses.replace(full, pairs=(None, None, None)))


@pytest.mark.parametrize("lengths", [[[5], [], []], [[], [], []]])
def test_everything_stays_in_the_graph_of_absent_tasks(
    lengths: list[list[int]], make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """Other ranks can have rows of it under ZeRO 3: backward gathers parameters together."""
    model = make_model(adapter={"name": "pal", "size": 12, "heads": 4})
    results = model(make_batch(lengths, pairs=PAIRS))
    grads = gradients(model, sum(loss for loss, _ in results.values()))
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert not any(grad.any() for name, grad in grads.items() if name.startswith(("heads.1.", "heads.2.")))


@every_adapter
def test_every_module_touches_only_its_own_parameters(
    adapter: dict, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """A parameter has storage only while its module runs forward or backward, as under ZeRO 3."""
    model = make_model(adapter=adapter).eval()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    results = model(batch)
    total = sum(loss for loss, _ in results.values())
    expected = gradients(model, total)
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
    partitioned = model(batch)
    for name, (loss, _) in results.items():
        assert torch.equal(partitioned[name][0], loss)
    for parameter, data in kept.items():
        parameter.data = data
    found = gradients(model, sum(loss for loss, _ in partitioned.values()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_one_backward_gives_every_tasks_gradient(recompute: str, make_model: MakeModel, make_batch: MakeBatch) -> None:
    encoder = {"recompute": recompute, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    model = make_model(encoder=encoder, adapter={"name": "pal", "size": 12, "heads": 4}).eval().double()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    shared = model.shared_parameters()
    sink = StackSink(shared, 3, dtype=torch.float64)
    with sink.armed(torch.device("cpu")):
        losses = model(batch, task_grads=sink)
        torch.autograd.grad(sum(loss for loss, _ in losses.values()), [sink.anchor])
    for task, name in enumerate(losses):
        expected = torch.autograd.grad(model(batch)[name][0], shared)
        for parameter, gradient in zip(shared, expected, strict=True):
            # The sink adds rows in float32. The error budget is for the tensor, not for elements
            # that cancel: the gradient of the keys' bias consists of rounding errors.
            error = (sink.stack_of(parameter).of(parameter)[task] - gradient).abs().max()
            assert error <= 1e-6 * gradient.abs().max() + 1e-12


@every_adapter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(
    dtype: torch.dtype, adapter: dict, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """DeepSpeed casts the module; losses stay fp32."""
    batch = make_batch(LENGTHS, pairs=PAIRS)
    exact = make_model(adapter=adapter).eval()
    rounded = make_model(adapter=adapter).eval().to(dtype)
    expected, found = exact(batch), rounded(batch)
    for name, (loss, _) in found.items():
        assert loss.dtype == torch.float32
        assert abs(loss - expected[name][0]) < 0.05 * expected[name][0]
    sum(loss for loss, _ in found.values()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in rounded.parameters())  # type: ignore[arg-type]


def test_parameters_are_shared_or_belong_to_tasks(make_model: MakeModel) -> None:
    model = make_model(adapter={"name": "lora", "size": 2})
    own = model.task_parameters()
    assert own.keys() == {"adapters", "heads"}
    everything = [*model.shared_parameters(), *own["adapters"], *own["heads"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    frozen = make_model(encoder={"freeze": True})
    assert frozen.shared_parameters() == [] and all(p.requires_grad for p in frozen.heads.parameters())
    assert make_model().task_parameters()["adapters"] == []


def test_parameter_groups(make_model: MakeModel) -> None:
    config = OptimizerConfig(lr=1e-5, adapter_lr=2e-4, head_lr=3e-3, weight_decay=0.1)
    model = make_model(adapter={"name": "lora", "size": 2})
    groups = model.parameter_groups(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {"encoder": 1e-5, "adapters": 2e-4, "heads": 3e-3}
    seen = []
    for group in groups:
        assert group["lr"] == rates[group["name"]]
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["name"].startswith(name.split(".")[0])
            assert (group["weight_decay"] == 0.0) == (name.endswith("bias") or "LayerNorm" in name)
    assert sorted(seen) == sorted(names.values())
    assert {group["lr"] for group in model.parameter_groups(OptimizerConfig(lr=7e-5))} == {7e-5}
    frozen = make_model(encoder={"freeze": True})
    assert {group["name"] for group in frozen.parameter_groups(config)} == {"heads"}
    torch.optim.AdamW(groups).step()


def test_weights_are_kept_beside_the_losses(make_model: MakeModel, make_batch: MakeBatch) -> None:
    light = {**cosine_and_linear()["sts"], "weight": 0.25}
    batch = make_batch([[6, 3, 8, 8]], pairs=[True])
    model = make_model(tasks={"sts": light}).eval()
    assert model.task_weights == {"sts": 0.25}
    torch.testing.assert_close(model(batch)["sts"], make_model(tasks=cosine_and_linear()).eval()(batch)["sts"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": {"name": "liner"}}, "tasks.x: unknown head 'liner'"),
        ({"pooling": "max_"}, "tasks.x: unknown pooling 'max_'"),
        ({"loss": "bce"}, "tasks.x: loss: bce does not fit a classification task"),
    ],
)
def test_errors_name_the_task(settings: dict, message: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=message):
        make_model(tasks={"x": {"type": "classification", "num_labels": 2, "data": {}, **settings}})


def test_the_model_learns(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """The loss of every task on one batch falls to a tenth: head, adapter and encoder learn."""
    model = make_model(
        encoder={"hidden_dropout": 0.0, "attention_dropout": 0.0}, adapter={"name": "pal", "size": 12, "heads": 4}
    )
    batch = make_batch(LENGTHS, pairs=PAIRS)
    optimizer = torch.optim.AdamW(model.parameter_groups(OptimizerConfig(lr=3e-3)))
    model.eval()
    first = {name: loss.item() for name, (loss, _) in model(batch).items()}
    for _ in range(60):
        optimizer.zero_grad()
        sum(loss for loss, _ in model(batch).values()).backward()
        optimizer.step()
    for name, (loss, _) in model(batch).items():
        assert loss < 0.1 * first[name], name


def test_an_adapter_drops_beside_an_encoder_that_does_not(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(adapter={"name": "lora", "size": 2, "dropout": 0.5})
    model.heads.eval()
    model.encoder.eval()
    batch = make_batch(LENGTHS, pairs=PAIRS)
    first, second = (model(batch)["para"][0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(batch)["para"][0], model(batch)["para"][0])
