"""Layers on top of the encoder against transformers' BERT layer and the formula, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from fastmtl.config import AdapterConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.adapters import build_adapter
from fastmtl.model.adapters.top import Top
from fastmtl.model.encoder.bert import bert_settings
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.multitask import MultiTaskModel

MakeBatch = Callable[..., PackedBatch]
MakeModel = Callable[..., MultiTaskModel]
TASKS = ["a", "b", "c"]
LENGTHS = [[5, 1, 9], [], [3, 7]]
TOPS = ["layer", "pal"]


def sizes(dropout: float = 0.0, **others: int) -> BertConfig:
    settings: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    return BertConfig(**{**settings, **others}, attention_probs_dropout_prob=dropout, hidden_dropout_prob=dropout)


def build(top: Any, bert: BertConfig, **settings: Any) -> Top:
    torch.manual_seed(0)
    settings = {"name": "none", "size": 8, "heads": 2, **settings}
    adapter = build_adapter(AdapterConfig(top=top, **settings), bert_settings(bert), TASKS)
    assert adapter is not None and adapter.top is not None
    return adapter.top


def randomise(top: Top) -> Top:
    generator = torch.Generator().manual_seed(1)
    for parameter in top.parameters():
        values = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data = values / parameter.shape[-1] ** 0.5
    return top


def context_of(batch: PackedBatch, *, training: bool = False) -> ForwardContext:
    return ForwardContext.build(batch, 3 + len(TASKS), training=training)


def per_sequence(x: Tensor) -> list[tuple[int, Tensor]]:
    """Yield the task and the rows of every sequence."""
    tasks = [task for task, own in enumerate(LENGTHS) for _ in own]
    return list(zip(tasks, x.split([length for own in LENGTHS for length in own]), strict=True))


def check_gradients(top: Top, ours: Tensor, theirs: Tensor, x: Tensor, copy: Tensor, copies: dict[str, Tensor]) -> None:
    """Compare gradients. ours, theirs: scalars of x and the top's parameters, and of copies."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    names = ["hidden", *(name for name, _ in top.named_parameters())]
    found = torch.autograd.grad(ours, [x, *top.parameters()])
    wanted = torch.autograd.grad(theirs, [copy, *copies.values()], allow_unused=True)
    for name, mine, other in zip(names, found, wanted, strict=True):
        if other is None:
            assert ".1." in name and not mine.any()  # of the task without rows
        else:
            assert (mine - other).abs().max() <= 1e-11 * other.abs().max() + 1e-13, name


def inputs(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = torch.randn(2, batch.num_tokens, 24, dtype=torch.float64, generator=generator)
    return made[0].clone().requires_grad_(), made[0].clone().requires_grad_(), made[1]


def test_a_layer_is_transformers_bert_layer_of_each_task(make_batch: MakeBatch) -> None:
    bert = sizes()
    bert._attn_implementation = "eager"
    top, batch = randomise(build("layer", bert)), make_batch(LENGTHS)
    layers = [BertLayer(bert).double().eval() for _ in TASKS]
    copies: dict[str, Tensor] = {}
    for task, layer in enumerate(layers):
        layer.load_state_dict(top.tasks[task].state_dict(), strict=True)
        copies |= {f"tasks.{task}.{name}": p for name, p in layer.named_parameters()}
    assert copies.keys() == dict(top.named_parameters()).keys()
    copies = {name: copies[name] for name, _ in top.named_parameters()}
    x, copy, upstream = inputs(batch)
    losses = (
        (first(layers[task](rows[None]))[0] * u).sum()
        for (task, rows), (_, u) in zip(per_sequence(copy), per_sequence(upstream), strict=True)
    )
    theirs = sum(losses, start=torch.zeros((), dtype=torch.float64))
    check_gradients(top, (top(x, context_of(batch)) * upstream).sum(), theirs, x, copy, copies)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("settings", [{}, {"top_size": 12, "activation": "gelu"}, {"projections": 2}], ids=str)
def test_pal_follows_the_formula(settings: dict, make_batch: MakeBatch) -> None:
    top, batch = randomise(build("pal", sizes(), **settings)), make_batch(LENGTHS)
    copies = {name: p.detach().clone().requires_grad_() for name, p in top.named_parameters()}
    x, copy, upstream = inputs(batch)
    theirs = copy.new_zeros(())
    for (task, rows), (_, u) in zip(per_sequence(copy), per_sequence(upstream), strict=True):
        p = {name.removeprefix("pal."): value[task] for name, value in copies.items()}
        z = rows @ p["encode.weight"].T
        if "encode_inner.0.weight" in p:
            z = z @ p["encode_inner.0.weight"].T
        query, key, value = ((z @ w.T).unflatten(1, (2, -1)).transpose(0, 1) for w in p["attention.3.weight"])
        z = functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
        if "decode_inner.0.weight" in p:
            z = z @ p["decode_inner.0.weight"].T
        y = z @ p["decode.weight"].T
        y = functional.gelu(y) if "activation" in settings else y
        theirs = theirs + ((rows + y) * u).sum()
    check_gradients(top, (top(x, context_of(batch)) * upstream).sum(), theirs, x, copy, copies)


def test_weight_counts_are_those_of_table_1() -> None:
    bert, d_m, d_s = BertConfig(num_hidden_layers=1), 768, 256

    def weights(top: Top) -> int:
        return sum(p.numel() for p in top.parameters() if p.ndim > 1)

    assert weights(build("layer", bert)) == len(TASKS) * 12 * d_m**2
    assert weights(build("pal", bert, top_size=d_s)) == len(TASKS) * (2 * d_m * d_s + 3 * d_s**2)


@pytest.mark.parametrize("top", TOPS)
def test_no_influence_adds_exactly_zero_and_can_learn(top: str, make_batch: MakeBatch) -> None:
    module, batch = build(top, sizes(), init="no_influence").double(), make_batch(LENGTHS)
    hidden = torch.randn(batch.num_tokens, 24, dtype=torch.float64)
    y = module(hidden, context_of(batch))
    normalised = functional.layer_norm(functional.layer_norm(hidden, (24,), eps=1e-12), (24,), eps=1e-12)
    torch.testing.assert_close(y, hidden if top == "pal" else normalised, rtol=0, atol=0 if top == "pal" else 1e-13)
    y.backward(torch.randn_like(y))
    last = [p for name, p in module.named_parameters() if not p.any() and p.ndim > 1]
    assert last and all(p.grad.any() for p in last if p.shape[0] == len(TASKS))
    if top == "layer":
        assert all(module.tasks[task].output.dense.weight.grad.any() == bool(LENGTHS[task]) for task in range(3))
        assert all(
            module.tasks[task].attention.output.dense.weight.grad.any() == bool(LENGTHS[task]) for task in (0, 2)
        )


@pytest.mark.parametrize("init", ["default", "xavier"])
def test_initialisation_is_the_adapters(init: str) -> None:
    bert = BertConfig(hidden_size=96, num_hidden_layers=1, intermediate_size=384)
    for name, parameter in build("layer", bert, init=init).named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()
        elif init == "default":
            assert 0.018 < parameter.std() < 0.022
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("top", TOPS)
def test_dropout_is_each_tasks_own_and_for_training_only(top: str, make_batch: MakeBatch) -> None:
    module, batch = build(top, sizes(dropout=0.4), dropout=0.4).double(), make_batch([[20], [20], []])
    rows = torch.randn(20, 24, dtype=torch.float64)
    hidden = torch.cat([rows, rows])
    for source, target in ((p[0], p[1]) for p in module.parameters() if p.shape[0] == 3):
        target.data.copy_(source)
    if top == "layer":
        module.tasks[1].load_state_dict(module.tasks[0].state_dict())
    context, other = context_of(batch, training=True), context_of(batch, training=True)
    y = module(hidden, context)
    assert torch.equal(y, module(hidden, context))  # a recomputed pass
    assert not torch.equal(y, module(hidden, other))
    assert not torch.equal(y[:20], y[20:])  # equal tasks and rows, different masks
    module.eval()
    exact = module(hidden, context)
    assert torch.equal(exact[:20], exact[20:]) and torch.equal(exact, module(hidden, other))


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("top", TOPS)
def test_a_top_stands_after_the_last_layer(
    top: str, recompute: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """The model returns the top's output for the hidden states below it, also in training."""
    batch = make_batch([[5, 1, 9], [7, 12], [6, 3, 8, 8]], pairs=[False, False, True])
    settings = {"name": "low_rank", "size": 6, "heads": 2, "top": top}
    model = make_model(adapter=settings, encoder={"recompute": recompute}).train()
    assert model.adapter is not None and model.adapter.top is not None
    seen: list[tuple] = []
    model.adapter.top.register_forward_hook(lambda _, given, made: seen.append((*given, made)))
    torch.manual_seed(5)
    hidden = model.encoder(batch, model.adapter)
    below, context, made = seen[0]
    assert torch.equal(hidden, made) and torch.equal(hidden, model.adapter.top(below, context))
    hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.adapter.parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": "pal", "size": 10, "heads": 4}, "adapter.size: 10 is not a multiple of adapter.heads: 4"),
        ({"top": "pal", "size": 8, "heads": 4, "top_size": 6}, "adapter.top_size: 6 is not a multiple of"),
        ({"name": "lora", "top": "layer", "top_size": 6}, "adapter.top_size: 6: adapter.top: layer has no size"),
        ({"name": "low_rank", "top": "layer", "projections": 2}, "adapter.projections: 2: low_rank has no projections"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_adapter(AdapterConfig(**settings), bert_settings(sizes()), TASKS)


def test_summary() -> None:
    assert AdapterConfig(name="low_rank").summary == "low_rank"
    assert AdapterConfig(name="low_rank", top="layer").summary == "low_rank with a layer on top"
    assert AdapterConfig(top="pal").summary == "pal on top"
