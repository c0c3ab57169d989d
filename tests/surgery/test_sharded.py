"""A torch optimiser whose parameters fully_shard (FSDP2) has sharded, on two ranks.

A step equals one in a single process with the joined batch.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import sharded_cases as cases
import torch
from scripts import run_script

pytestmark = pytest.mark.slow(6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank has found."""
    directory = tmp_path_factory.mktemp("sharded")
    run_script(cases.__file__, directory, timeout=300)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(ranks: list[dict[str, Any]], case: cases.Case) -> None:
    expected = cases.train_alone(case)
    for rank in ranks:
        cases.compare(rank[case.name], expected, case)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no model", r"surgery needs the modules: give GradientSurgery\(\.\.\., model=trunk\)"),
        ("passes", r'with passes="one"'),
        ("kept", r"storage='kept' needs every gradient at hand, which ZeRO 3, offload and fully_shard do not give"),
        ("max_norm", r"leave max_norm out and call torch.nn.utils.clip_grad_norm_"),
        ("outside", r"1 parameters are not in `model` \(the first has shape \(2, 6\)\)"),
        ("gathered", r"3 parameters are not the optimiser's \(the first has shape \(6, 7\)\): .*call reshard\(\)"),
        ("part", r"module first \(Linear\) runs while its parameter weight is sharded"),
        (
            "bypassing",
            r"shared parameter .* is used by an op that does not write into task_grads.*"
            r"use DistributedDataParallel in place of fully_shard, with passes=.per_task",
        ),
        ("declares", r"loss_fn declares task_grads, .*leave task_grads out"),
        ("factor", r"a gradient of norm [\d.]+, and the merged one has [\d.]+: leave set_gradient_divide_factor"),
        ("some", r"a parameter of shape \(2, 6\) is not sharded, and others of the optimiser are"),
        ("mesh", r"is sharded over a mesh of 1 of 2 processes"),
        ("tensor parallel", r"has the placements .*Shard\(dim=1\).*, without tensor parallelism"),
        ("adamw", r"SurgeryAdamW does not update shards"),
    ],
)
def test_errors_on_both_ranks(ranks: list[dict[str, Any]], name: str, text: str) -> None:
    for rank in ranks:
        found = rank["errors"]
        assert found["none"] == ""
        assert found[name].startswith("UserError") and re.search(text, found[name]), found[name]


def test_a_gradient_that_is_not_finite_on_one_rank(ranks: list[dict[str, Any]]) -> None:
    """Both ranks skip the step, or stop, where fully_shard has given the head its gradient."""
    for rank in ranks:
        found = rank["not finite"]
        assert found["trunk"] == "kind"
        assert re.search("TrainingError: the gradient of number 18 of the optimiser is not finite", found["head"])
