"""The benchmark of a whole step: losses are equal, then every step trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl import cli
from fastmtl.bench import sizes, step
from fastmtl.bench.activations import kept_bytes
from fastmtl.bench.sizes import Shape, Size
from fastmtl.bench.step_ways import COMPILED, DEFAULT, WAYS, products
from fastmtl.bench.workload import Workload
from fastmtl.errors import UserError

TINY = Shape("tiny", hidden=32, layers=2, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)


def quiet(_: str) -> None:
    pass


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sizes.STEP_SHAPES, "minilm", (TINY, "bert"))
    file = tmp_path / "step.json"
    cli.app(["bench", "step", "--rounds", "2", "--json", str(file)], standalone_mode=False)
    result = json.loads(file.read_text())
    assert set(result["steps"]) == {"transformers", "fastmtl sum", "fastmtl pcgrad", "matrix products"}
    assert all(len(entry["samples_s"]) == 2 for entry in result["steps"].values())
    assert result["steps"]["transformers"]["ratio_to_transformers"] == 1
    calls = {name: entry["operator_calls"] for name, entry in result["steps"].items()}
    assert all(0 < found["without_optimizer"] <= found["operators"] for found in calls.values())
    pcgrad = result["steps"]["fastmtl pcgrad"]["calls_to_transformers"]["operators"]
    assert pcgrad == calls["fastmtl pcgrad"]["operators"] / calls["transformers"]["operators"]
    assert result["loss_error"] <= 1e-5
    assert result["padded_tokens"] > result["tokens"]
    assert "dropout 0.1" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_other_families_have_transformers_losses(family: str) -> None:
    result = step.bench_step(Size(TINY, family=family), 1, quiet)
    assert set(result["steps"]) == set(DEFAULT) and result["loss_error"] <= 1e-5


@pytest.mark.parametrize(("recompute", "of_d", "of_f"), [("none", 8, 3), ("cheap", 6, 2), ("full", 1, 0)])
def test_bytes_that_modernbert_keeps(recompute: Any, of_d: int, of_f: int) -> None:
    work = Workload(Size(TINY, dropout=step.DROPOUT, family="modernbert"))
    found = kept_bytes(work, lambda work: work.recomputing(recompute))["kept_bytes_per_token_and_layer"]
    statistics = 0 if recompute == "full" else 8 * TINY.heads + 16 + 8  # of attention and LayerNorm, and a mask
    assert found == pytest.approx(4 * (of_d * TINY.hidden + of_f * TINY.intermediate) + statistics, abs=0.5)


def test_other_losses_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Workload):
        @property
        def packed(self) -> Any:
            model = super().packed
            model.encoder.encoder.layer[0].output.LayerNorm.eps = 1.0
            return model

    monkeypatch.setattr(step, "Workload", Other)
    with pytest.raises(step.LossMismatch, match="the loss of task . is off by"):
        step.bench_step(Size(TINY), 1, quiet)


@pytest.mark.parametrize("name", ["transformers", "fastmtl sum", "fastmtl pcgrad", "fastmtl sum, lora 8"])
def test_each_way_trains_with_dropout(name: str) -> None:
    work = Workload(Size(TINY, dropout=step.DROPOUT))
    way = WAYS[name]
    assert way.model is not None
    model = way.model(work).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    drawn = torch.get_rng_state()
    way.build(work, model)()
    assert not torch.equal(drawn, torch.get_rng_state())
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    # Embeddings that no token looks up, and the keys' bias, which does not affect softmax, change
    # by weight decay alone.
    assert not [name for name in same if name.endswith(".weight")]


def test_the_products_are_those_of_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(Size(TINY))
    run = products(work)
    done = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append(a.shape[0] * a.shape[1] * b.shape[1]))
    run()
    in_layers = sum(m.weight.numel() for m in work.packed.encoder.modules() if isinstance(m, torch.nn.Linear))
    assert sum(done) == 3 * work.packed_batch.num_tokens * in_layers


def test_the_compiled_encoder_is_one_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append((module, options)))
    work = Workload(Size(TINY))
    model: Any = WAYS[COMPILED[0]].model(work)
    assert calls == [(model.encoder, {"dynamic": True})]
    assert model.encoder is not work.padded.encoder
    assert step.padded_losses(work, model) == step.padded_losses(work, work.padded)


@pytest.mark.slow(12)
@pytest.mark.parametrize("sweep", step.SWEEPS)
def test_sweeps(
    sweep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sizes.STEP_SHAPES, "minilm", (TINY, "bert"))
    monkeypatch.setattr(step, "TOKENS", (128, 256))
    monkeypatch.setattr(step, "TASKS", (2, 4))
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "sweep.json"
    options = ["--rounds", "1", "--json", str(file), "--plot", str(tmp_path), "--commit", "abc"]
    cli.app(["bench", "step", "--sweep", sweep, *options], standalone_mode=False)
    result = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert (tmp_path / f"step-{sweep}-tiny.svg").exists()
    if sweep in step.BY_TURNS:
        wanted = step.BY_TURNS[sweep]
        assert set(result["steps"]) | set(result["skipped"]) == set(wanted)
        assert all(name in printed for name in wanted)
        kept = {name: entry.get("kept_bytes_per_token", 0) for name, entry in result["steps"].items()}
        for method in ("sum", "pcgrad") if sweep == "recompute" else ():
            cheap, full = kept[f"fastmtl {method}, recompute cheap"], kept[f"fastmtl {method}, recompute full"]
            assert kept["transformers"] > kept[f"fastmtl {method}"] > cheap > full > 0
            assert f"{cheap:,.0f}" in printed
        return
    names = {"tokens": ["128 tokens", "256 tokens"], "tasks": ["2 tasks", "4 tasks"], "precisions": ["fp32", "bf16"]}
    assert [point["name"] for point in result["points"]] == names[sweep]
    assert all(set(point["steps"]) == set(DEFAULT) for point in result["points"])
    key = {"tokens": "tokens", "tasks": "tasks", "precisions": "precision"}[sweep]
    assert result["points"][0][key] != result["points"][1][key]


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--rows and --tokens exclude each other"):
        cli.app(["bench", "step", "--rows", "3", "--tokens", "2000"], standalone_mode=False)
    with pytest.raises(UserError, match="--sweep and --compiled exclude each other"):
        cli.app(["bench", "step", "--sweep", "tasks", "--compiled"], standalone_mode=False)
