"""The benchmark of a whole step: equal losses first, then every step really trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmtl import cli
from fastmtl.bench import sizes, step
from fastmtl.bench.sizes import Shape, Size
from fastmtl.bench.workload import Workload

TINY = Shape("tiny", hidden=32, layers=2, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)


def quiet(_: str) -> None:
    pass


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sizes.SHAPES, "minilm", TINY)
    file = tmp_path / "step.json"
    cli.app(["bench", "step", "--rounds", "2", "--json", str(file)], standalone_mode=False)
    result = json.loads(file.read_text())
    assert set(result["steps"]) == {"transformers", "fastmtl sum", "fastmtl pcgrad", "matrix products"}
    assert all(len(entry["samples_s"]) == 2 for entry in result["steps"].values())
    assert result["steps"]["transformers"]["ratio_to_transformers"] == 1
    assert result["loss_error"] <= 1e-5
    assert result["padded_tokens"] > result["tokens"]
    assert "dropout 0.1" in capsys.readouterr().out


def test_other_losses_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Workload):
        @property
        def packed(self):  # noqa: ANN202
            model = super().packed
            model.encoder.encoder.layer[0].output.LayerNorm.eps = 1.0
            return model

    monkeypatch.setattr(step, "Workload", Other)
    with pytest.raises(step.LossMismatch, match="the loss of task . is off by"):
        step.bench_step(Size(TINY), 1, quiet)


@pytest.mark.parametrize("way", [step._transformers, step._joint, step._pcgrad])
def test_each_way_trains_with_dropout(way) -> None:  # noqa: ANN001
    work = Workload(Size(TINY, dropout=step.DROPOUT))
    model = (work.padded if way is step._transformers else work.packed).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    drawn = torch.get_rng_state()
    way(work)()
    assert not torch.equal(drawn, torch.get_rng_state())
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    # What no token of these rows looks up, and the keys' bias, which softmax does not see, move by decay alone.
    assert not [name for name in same if name.endswith(".weight")]


def test_the_products_are_those_of_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(Size(TINY))
    products = step._products(work)
    done = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append(a.shape[0] * a.shape[1] * b.shape[1]))
    products()
    in_layers = sum(m.weight.numel() for m in work.packed.encoder.modules() if isinstance(m, torch.nn.Linear))
    assert sum(done) == 3 * work.packed_batch.num_tokens * in_layers
