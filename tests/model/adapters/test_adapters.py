"""Adapters, compared with the formulas task by task in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig

from fastmtl.config import AdapterConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.adapters import Adapter, build_adapter
from fastmtl.model.encoder.bert import bert_settings
from fastmtl.model.encoder.context import ForwardContext

MakeBatch = Callable[..., PackedBatch]
TASKS = ["a", "b", "c"]
LENGTHS = [[5, 1, 9], [], [3, 7]]
# Adapter and settings.
FORMULAS: list[tuple[str, dict]] = [
    ("pal", {}),
    ("pal", {"activation": "gelu", "size": 12}),
    ("pal", {"projections": 2}),
    ("pal", {"projections": 3, "activation": "gelu"}),
    ("pal", {"size": 204, "heads": 12}),
    ("pal", {"size": 204, "heads": 6}),
    ("pal", {"size": 132, "heads": 12}),
    ("pal", {"size": 256, "heads": 4}),
    ("low_rank", {}),
    ("low_rank", {"activation": "gelu", "size": 12}),
    ("low_rank", {"size": 256}),
    ("lora", {}),
    ("lora", {"size": 1}),
]
every_formula = pytest.mark.parametrize(("name", "settings"), FORMULAS, ids=lambda value: str(value).replace(" ", ""))
BERT = BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, attention_probs_dropout_prob=0.0)


def build(name: str, bert: BertConfig = BERT, **settings: Any) -> Adapter:
    torch.manual_seed(0)
    settings = {"size": 8, "heads": 4, **settings}
    adapter = build_adapter(AdapterConfig(name=name, **settings), bert_settings(bert), TASKS)
    assert adapter is not None
    return adapter


def randomise(adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data /= parameter.shape[-1] ** 0.5  # otherwise products of many maps leave one key in each softmax
    return adapter


def context_of(batch: PackedBatch, *, training: bool = False) -> ForwardContext:
    return ForwardContext.build(batch, 3, training=training)


def attention(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Attend in one sequence; weight [3, d_s, d_s]."""
    size = x.shape[1] // heads
    query, key, value = (x @ w.T for w in weight)
    parts = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(size)
        parts.append(scores.softmax(dim=1) @ value[:, columns])
    return torch.cat(parts, dim=1)


def naive(name: str, p: dict[str, Tensor], layer: int, task: int, x: Tensor, settings: dict) -> Tensor:
    """Return TS_t(h) of one sequence by the formulas of the papers."""
    activation = functional.gelu if settings.get("activation") == "gelu" else (lambda y: y)
    if name == "pal":
        between = range(settings.get("projections", 1) - 1)
        x = x @ p["encode.weight"][task].T
        for number in between:
            x = x @ p[f"encode_inner.{number}.weight"][task].T
        x = attention(x, p[f"attention.{layer}.weight"][task], settings.get("heads", 4))
        for number in between:
            x = x @ p[f"decode_inner.{number}.weight"][task].T
        return activation(x @ p["decode.weight"][task].T)
    encode, decode = p[f"encode.{layer}.weight"][task], p[f"decode.{layer}.weight"][task]
    if name == "low_rank":
        return activation(x @ encode.T) @ decode.T
    inner = x @ encode.T + p[f"encode.{layer}.bias"][task]
    return inner @ decode.T + p[f"decode.{layer}.bias"][task]


@every_formula
def test_outputs_and_gradients_follow_the_formula(name: str, settings: dict, make_batch: MakeBatch) -> None:
    adapter = randomise(build(name, **settings))
    batch = make_batch(LENGTHS)
    context = context_of(batch)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(batch.num_tokens, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(hidden.shape, dtype=torch.float64, generator=generator)
    total = sum((adapter(hidden, context.at(layer)) * upstream).sum() for layer in range(3))
    names = [key for key, _ in adapter.named_parameters()]
    gradients = torch.autograd.grad(total, [hidden, *adapter.parameters()])

    copies = {key: value.detach().clone().requires_grad_() for key, value in adapter.named_parameters()}
    reference = hidden.detach().clone().requires_grad_()
    expected = reference.new_zeros(())
    tasks = [task for task, own in enumerate(LENGTHS) for _ in own]
    lengths = [length for own in LENGTHS for length in own]
    for layer in range(3):
        for task, x, u in zip(tasks, reference.split(lengths), upstream.split(lengths), strict=True):
            expected = expected + (naive(name, copies, layer, task, x, settings) * u).sum()
    wanted = torch.autograd.grad(expected, [reference, *copies.values()])
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for key, ours, theirs in zip(["hidden", *names], gradients, wanted, strict=True):
        scale = theirs.abs().max()
        assert (ours - theirs).abs().max() <= 1e-11 * scale, key
        if key != "hidden":
            assert not ours[1].any()  # of the task without rows
            assert ours[0].any() and ours[2].any()


def count(adapter: Adapter, *, weights: bool) -> int:
    return sum(p.numel() for key, p in adapter.named_parameters() if key.endswith("weight") == weights)


def test_weight_counts_are_those_of_table_1() -> None:
    bert = BertConfig()  # 12 layers of size 768
    tasks, d_m, d_s = len(TASKS), 768, 204
    pal = build("pal", bert, size=d_s, heads=12)
    assert count(pal, weights=True) == tasks * (2 * d_m * d_s + 12 * 3 * d_s**2)
    assert count(pal, weights=False) == 0
    for projections in (2, 3):
        stacked = build("pal", bert, size=d_s, heads=12, projections=projections)
        inner = 2 * (projections - 1) * d_s**2
        assert count(stacked, weights=True) == tasks * (2 * d_m * d_s + inner + 12 * 3 * d_s**2)
    low_rank = build("low_rank", bert, size=100)
    assert count(low_rank, weights=True) == tasks * (12 * 2 * d_m * 100)
    assert count(low_rank, weights=False) == 0
    lora = build("lora", bert, size=2)
    assert count(lora, weights=True) == tasks * (12 * 2 * d_m * 2)
    assert count(lora, weights=False) == tasks * 12 * (2 + d_m)


@every_formula
def test_no_influence_is_exactly_zero_and_can_learn(name: str, settings: dict, make_batch: MakeBatch) -> None:
    adapter = build(name, init="no_influence", **settings).double()
    batch = make_batch(LENGTHS)
    hidden = torch.randn(batch.num_tokens, 24, dtype=torch.float64)
    total = sum(adapter(hidden, context_of(batch).at(layer)) for layer in range(3))
    assert not total.any()
    total.backward(torch.randn(total.shape, dtype=total.dtype))
    assert any(p.grad[0].any() and p.grad[2].any() for key, p in adapter.named_parameters() if key.endswith("weight"))


@pytest.mark.parametrize("name", ["pal", "low_rank", "lora"])
def test_initialisation(name: str) -> None:
    for key, parameter in build(name, BertConfig(hidden_size=96, num_hidden_layers=2), size=48).named_parameters():
        if key.endswith("bias"):
            assert not parameter.any()
        else:
            assert 0.018 < parameter.std() < 0.022
    bert = BertConfig(hidden_size=96, num_hidden_layers=2)
    for key, parameter in build(name, bert, size=48, init="xavier").named_parameters():
        if key.endswith("weight"):
            bound = math.sqrt(6 / sum(parameter.shape[-2:]))
            assert 0.95 * bound < parameter.abs().max() <= bound


def test_only_the_listed_layers_carry_the_adapter(make_batch: MakeBatch) -> None:
    batch = make_batch(LENGTHS)
    hidden = torch.randn(batch.num_tokens, 24, dtype=torch.float64)
    for name in ("pal", "low_rank", "lora"):
        adapter = build(name, layers=[2, 0]).double()
        given = [adapter(hidden, context_of(batch).at(layer)) is not None for layer in range(3)]
        assert given == [True, False, True]
        assert not any(".1." in key for key, _ in adapter.named_parameters())


@pytest.mark.parametrize("name", ["pal", "low_rank", "lora"])
def test_dropout_is_each_tasks_own_and_for_training_only(name: str, make_batch: MakeBatch) -> None:
    adapter = build(name, dropout={"a": 0.5}).double()
    batch = make_batch([[40], [40], [40]])
    hidden = torch.randn(120, 24, dtype=torch.float64)
    adapter.eval()
    exact = adapter(hidden, context_of(batch).at(0))
    adapter.train()
    context = context_of(batch, training=True)
    dropped = adapter(hidden, context.at(0))
    zeros = dropped[:40] == 0
    assert 0.4 < zeros.double().mean() < 0.6
    torch.testing.assert_close(dropped[:40][~zeros], 2 * exact[:40][~zeros])
    assert torch.equal(dropped[40:], exact[40:])
    assert torch.equal(dropped, adapter(hidden, context.at(0)))  # a recomputed pass
    others = [adapter(hidden, context.at(1)), adapter(hidden, context_of(batch, training=True).at(0))]
    assert all(((other[:40] == 0) != zeros).any() for other in others)
    uniform = build(name, dropout=0.5)(hidden.float(), context.at(0))
    assert 0.45 < (uniform == 0).double().mean() < 0.55


def test_dropout_on_attention_is_the_encoders(make_batch: MakeBatch) -> None:
    bert = BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, attention_probs_dropout_prob=0.4)
    adapter = build("pal", bert).double()
    hidden = torch.randn(30, 24, dtype=torch.float64)
    first, second = (context_of(make_batch([[30], [], []]), training=True) for _ in range(2))
    assert not torch.equal(adapter(hidden, first.at(0)), adapter(hidden, second.at(0)))
    assert torch.equal(adapter(hidden, first.at(0)), adapter(hidden, first.at(0)))  # a recomputed pass
    adapter.eval()
    assert torch.equal(adapter(hidden, first.at(0)), adapter(hidden, second.at(0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "pla"}, "unknown adapter 'pla'. Did you mean 'pal'"),
        ({"name": "pal", "size": 10, "heads": 4}, "adapter.size: 10 is not a multiple of adapter.heads: 4"),
        ({"name": "pal", "size": 8, "heads": 4, "layers": [3]}, "adapter.layers: no layer 3: .* are 0 to 2"),
        ({"name": "lora", "layers": []}, "name at least one layer"),
        ({"name": "lora", "layers": [1, 1]}, "each once"),
        ({"name": "lora", "dropout": {"d": 0.1}}, "adapter.dropout: no task 'd'; the tasks are a, b, c"),
        ({"name": "lora", "dropout": 1.0}, "adapter.dropout: 1.0 is not a rate"),
        ({"name": "low_rank", "projections": 2}, "adapter.projections: 2: low_rank has no projections"),
        ({"name": "lora", "activation": "gelu"}, "adapter.activation: gelu: lora has no activation"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_adapter(AdapterConfig(**settings), bert_settings(BERT), TASKS)


def test_none_is_no_module() -> None:
    assert build_adapter(AdapterConfig(), bert_settings(BERT), TASKS) is None
