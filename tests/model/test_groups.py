"""Weight decay: the parameters that decay."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastmtl.config import OptimizerConfig
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
