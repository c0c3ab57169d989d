"""The benchmark of the engine's steps: settings and refusals. test_gpu_check.py runs all of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastmtl import cli
from fastmtl.bench import engine, ops
from fastmtl.bench.engine import WAYS, EngineWay, recipe_of
from fastmtl.bench.sizes import Size
from fastmtl.bench.workload import Workload
from fastmtl.errors import UserError
from fastmtl.measure.harness import Skipped


def quiet(_: str) -> None:
    pass


def test_each_way_is_a_recipe_that_differs_in_what_its_name_says() -> None:
    work = Workload(Size(ops.TINY, dropout=0.1))
    recipes = {name: recipe_of(way, work, "bf16") for name, way in WAYS.items()}
    for name, recipe in recipes.items():
        words = name.split(", ")
        assert (recipe.gradient.method, recipe.engine.zero, recipe.engine.precision) == (words[0], 1, "bf16")
        assert recipe.engine.flat_parameters == ("flat" in words)
        assert recipe.engine.cuda_graphs == ("graphs" in words)
        assert (recipe.gradient.dtype == "bfloat16") == ("J in bf16" in words)
        zero = {"overlap_comm": True, "compute_grad_norm": True}
        checks = {"bf16": {"check_grad_overflow": True}, "zero_optimization": zero}
        assert recipe.deepspeed == (checks if "DeepSpeed's checks" in words else {})
    assert "bf16" not in recipe_of(EngineWay("pcgrad", checks=True), work, "fp32").deepspeed


def test_what_cannot_be_measured_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'sum, flt'.*did you mean 'sum, flat'|sum, flat"):
        cli.app(["bench", "engine", "--way", "sum, flt"], standalone_mode=False)
    size = Size(ops.TINY)
    with pytest.raises(Skipped, match="CUDA graphs need an NVIDIA GPU, the model is on cpu"):
        engine._measured(EngineWay("sum", graphs=True), Workload(size), "fp32", 1, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cpu: DeepSpeed uses a GPU if there is one"):
        engine.bench_engine(dataclasses.replace(size, device="cpu"), 1, quiet)
