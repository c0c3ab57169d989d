"""A torch optimiser in a plain process group and with DistributedDataParallel, on two ranks.

A step equals one in a single process with the joined batch.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import group_cases as cases
import pytest
import ranked_groups
import torch
from scripts import run_script
from torch import Tensor

pytestmark = pytest.mark.slow(6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank has found."""
    directory = tmp_path_factory.mktemp("group")
    run_script(cases.__file__, directory, timeout=300)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(cases.WORLD)]


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(ranks: list[dict[str, Any]], case: cases.Case) -> None:
    found, other = (rank[case.name] for rank in ranks)
    for key in ("weights", "gradients"):
        assert all(torch.equal(found[key][name], other[key][name]) for name in found[key]), key
    local = ("reduce", "local") in case.options
    alone = dataclasses.replace(case, passes="one") if case.passes == "model" else case
    expected = cases.train(alone, [0, 1], 2, by_rank=True) if local else cases.train(alone, [0], 1)
    assert found["missing"] == other["missing"] == ["trunk.pooler.weight", "trunk.pooler.bias"]
    if case.adamw:  # in one process, it merges J without `.grad`
        del expected["gradients"]
    else:
        assert expected["missing"] == found["missing"]
    bound = 1e-5 if case.dtype == torch.float32 else 2**-7
    for key in expected.keys() & {"weights", "gradients"}:
        error = joined(found[key]) - joined(expected[key])
        assert error.norm() <= bound * joined(expected[key]).norm(), key
    for mine, its in zip(found["reports"], other["reports"], strict=True):
        compare_reports(mine, its, 0.0)
    for mine, wanted in zip(found["reports"], () if local else expected["reports"], strict=not local):
        compare_reports(mine, {**wanted, "stop": mine["stop"]}, max(bound, 1e-4))
    assert [report["stop"] for report in found["reports"]] == [False, True]
    assert torch.equal(found["layers"], other["layers"])
    if case.measures and not local:
        norms = expected["layers"].diagonal(dim1=-2, dim2=-1).sqrt()
        allowed = max(bound, 1e-5) * norms[..., None] * norms[..., None, :]
        assert ((found["layers"] - expected["layers"]).abs() <= 4 * allowed + 1e-12).all() and allowed.any()
    elif case.measures:  # the mean of the ranks' Gramians, as in the report
        for layers, report in zip(found["layers"], found["reports"], strict=True):
            gram = report["cosines"] * report["task_norms"] * report["task_norms"][:, None]
            torch.testing.assert_close(layers.sum(0).float(), gram.nan_to_num(), rtol=1e-5, atol=1e-6)


def compare_reports(found: dict[str, Any], expected: dict[str, Any], bound: float) -> None:
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[name], value, rtol=bound, atol=bound, equal_nan=True)
        else:
            assert found[name] == (value if value is None else pytest.approx(value, rel=bound, abs=bound)), name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "numbers",
            r"parameter number 2 of the optimiser, of shape \(6,\) .* not the same on all ranks \(its numbers\)",
        ),
        ("sign", r"parameter number 4 of the optimiser, of shape \(6,\) .* \(its numbers\)"),
        ("shape", r"parameter number 9 of the optimiser, .* \(its shape, its dtype or requires_grad\)"),
        ("frozen", r"parameter number 3 of the optimiser, .* \(its shape, its dtype or requires_grad\)"),
        ("number", r"the optimiser has 1[35] parameters on rank [01], and another number on other ranks"),
        ("sharded", r"a parameter of shape \(6,\) is of FullyShardedDataParallel \(FSDP1\)"),
        ("group", "has a process group of 1 of 2 processes"),
        ("late", "the process group has 2 ranks, and had 1 when GradientSurgery was made"),
    ],
)
def test_errors_on_both_ranks(ranks: list[dict[str, Any]], name: str, text: str) -> None:
    for rank in ranks:
        assert rank["same"] == ""
        assert rank[name].startswith("UserError") and re.search(text, rank[name]), rank[name]


def test_rows_that_mix_on_one_rank_stop_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["mixed"] == ranks[1]["mixed"]
    for name in ("stacked", "replay"):
        assert "rows of different tasks mix" in ranks[0]["mixed"][name]
    assert "module trained_norm (BatchNorm1d) gives other outputs" in ranks[0]["mixed"]["outputs"]


def test_a_failed_step_leaves_nothing(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["after failure"] for rank in ranks)


def test_a_gradient_that_is_not_finite_on_one_rank(ranks: list[dict[str, Any]]) -> None:
    """Both ranks skip the step, or stop where the gradient cannot be taken back."""
    for rank in ranks:
        found = rank["skipped"]
        assert found["pcgrad"] == "degree" and found["sum-clipped"].startswith("number ")
        assert all(found["pcgrad-grad"]) and all(found["sum-clipped-grad"])
        assert found["sum"].startswith("the loss of task") and found["tensor"].startswith("the gradient of task")
    assert ranks[0]["skipped"] == ranks[1]["skipped"]


@pytest.mark.parametrize("name", ["ranked", "ranked, one rank"])
def test_negatives_of_both_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    """Losses and gradients of the ranks add up to those of one process."""
    expected = ranked_groups.gradients(range(len(ranked_groups.COUNTS)))
    for key, value in expected.items():
        torch.testing.assert_close(ranks[0][name][key] + ranks[1][name][key], value)
