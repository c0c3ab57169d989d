"""Weight decay and learning rates: the parameters that decay, and the rates of lower layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from encoder_families import save_encoder_of
from packed_batches import build_model

from fastmtl.config import OptimizerConfig
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.multitask import MultiTaskModel


def recurrent(name: str) -> dict:
    head = {"name": name, "size": 4, "hidden": [3], "adjustment": True}
    return {"x": {"type": "classification", "num_labels": 2, "head": head, "data": {}}}


@pytest.mark.parametrize(
    "sections",
    [
        {"tasks": recurrent("lstm")},
        {"tasks": recurrent("rnn")},
        {"adapter": {"name": "pal", "size": 12, "top": "layer"}},
        {"adapter": {"name": "low_rank", "size": 12, "top": "pal"}},
        {"lora": {"rank": 2}},
        {"lora": {"rank": 2, "tasks": "own"}},
    ],
    ids=["lstm", "rnn", "layer on top", "pal on top", "lora", "lora of each task"],
)
def test_only_matrices_decay(sections: dict, make_model: Callable[..., MultiTaskModel]) -> None:
    """Adapter parameters have a dimension for tasks; an adjustment's matrix is named a bias."""
    model = make_model(**sections)
    groups = model.parameter_groups(OptimizerConfig())
    decays = {id(parameter): group["weight_decay"] > 0 for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        is_stacked = name.startswith(("adapter.", "lora.own.")) and not name.startswith("adapter.top.tasks.")
        is_matrix = parameter.dim() - is_stacked >= 2 and not name.endswith("row_bias")
        assert decays[id(parameter)] == is_matrix, name


@pytest.mark.parametrize("case", ["bert", "modernbert", "albert"])
def test_layer_decay_lowers_the_rates_of_lower_layers(case: str, tmp_path: Path) -> None:
    """The last layer and what follows it have the whole rate, as have adapters and heads."""
    base = save_encoder_of(case, tmp_path / "base")
    model = build_model(base, lora={"rank": 2, "targets": "all-linear"})
    layers = model.encoder.settings.num_hidden_layers
    config = OptimizerConfig(lr=1e-3, head_lr=1e-2, layer_decay=0.5)
    groups = model.parameter_groups(config)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert isinstance(model.encoder, PackedEncoder)
    for parameter in model.encoder.embeddings.parameters():
        assert rates[id(parameter)] == 1e-3 * 0.5**layers
    for number, layer in enumerate(model.encoder.layers, start=1):
        above = 0 if case == "albert" else layers - number  # the layers of ALBERT share their weights
        assert {rates[id(parameter)] for parameter in layer.parameters()} == {1e-3 * 0.5**above}
    for parameter in model.heads.parameters():
        assert rates[id(parameter)] == 1e-2
    plain = model.parameter_groups(OptimizerConfig(lr=1e-3, head_lr=1e-2))
    assert sum(len(group["params"]) for group in groups) == sum(len(group["params"]) for group in plain)
    everything = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
