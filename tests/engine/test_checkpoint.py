"""Checkpoints of real engines.

Bitwise resume with the same number of ranks, the universal form for another number, refusals.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import run_script

from fastmtl.config import Recipe, parse_recipe
from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import Ranks
from fastmtl.engine.manifest import Refused, read_manifest
from fastmtl.errors import UserError

WORKER = Path(__file__).with_name("checkpoint_cases.py")
STAGES = ("zero1", "zero2", "zero3", "zero1-flat")  # which any number of ranks can resume


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save and load in every ZeRO stage, with one and two ranks.

    One rank saves; two ranks save, and load the checkpoint of one; one rank loads that of two.
    """
    directory = tmp_path_factory.mktemp("checkpoints")
    run_script(WORKER, directory)
    return directory


@pytest.mark.slow(40)
@pytest.mark.parametrize("stage", ["zero0", *STAGES])
def test_resumed_run_is_bitwise_the_same(saved: Path, stage: str) -> None:
    straight, resumed = (load_file(saved / f"{stage}-2-{kind}.safetensors") for kind in ("straight", "resumed"))
    before = load_file(saved / f"{stage}-2-saved.safetensors")
    assert any(not torch.equal(before[name], straight[name]) for name in before)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.slow(40)
@pytest.mark.parametrize("savers", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_ranks_goes_on(saved: Path, stage: str, savers: int) -> None:
    prefix = f"{stage}-{savers}"
    before, loaded = (load_file(saved / f"{prefix}-{kind}.safetensors") for kind in ("saved", "universal-saved"))
    for name, tensor in before.items():
        assert torch.equal(tensor, loaded[name]), name
    # Two more AdamW steps agree only if the moments and the schedule were restored. Adam's m /
    # sqrt(v) gives the sign of a rounding-only gradient (a key's bias) the same effect as any
    # other, so those entries are excluded. Two ranks run the same steps directly; other tests show
    # that they equal the steps of one rank.
    straight, went_on = (load_file(saved / f"{p}.safetensors") for p in (f"{stage}-2-straight", f"{prefix}-universal"))
    for name, tensor in straight.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(
                went_on[name], tensor, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow(40)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_sums_of_squares_are_whole_on_any_number_of_ranks(saved: Path, stage: str) -> None:
    one, two = (load_file(saved / f"{stage}-{n}" / "step-2" / "tensors.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and len(one) > 10 and all(name.startswith("squares.") for name in one)
    for name, sums in one.items():
        assert sums.shape[0] == 3 and (sums.any() or name.endswith("key.bias")), name
        torch.testing.assert_close(sums, two[name], rtol=1e-3, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def recipe() -> Recipe:
    task = {"type": "binary", "data": {"train": "none"}}
    return parse_recipe({"tasks": {"kind": task}, "engine": {"zero": 1}}, "test")


class FakeEngine:
    """An engine that writes two files instead of DeepSpeed's."""

    def save_checkpoint(self, directory: str, tag: str, save_latest: bool) -> None:
        folder = Path(directory) / tag
        folder.mkdir()
        (folder / "model.pt").write_bytes(b"weights" * 100)
        (folder / "optim.pt").write_bytes(b"moments" * 100)


class OneRank(Ranks):
    def barrier(self) -> None:
        pass


@pytest.fixture
def checkpoints(tmp_path: Path, recipe: Recipe) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", recipe, OneRank(0, 1, 0, torch.device("cpu")))


def test_latest_two_and_best_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.6), (4, 0.7), (5, None)):
        checkpoints.save(FakeEngine(), step, {}, value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4", "step-5"]


@pytest.mark.parametrize("at", ["save_checkpoint", "write_manifest", "_sync"])
def test_a_save_that_breaks_off_leaves_the_previous_one(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    checkpoints.save(FakeEngine(), 1, {"epoch": 0})

    def broken(*arguments: object, **keywords: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        if at == "save_checkpoint":
            patch.setattr(FakeEngine, at, broken)
        else:
            patch.setattr(f"fastmtl.engine.checkpoint.{at}", broken)
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(FakeEngine(), 2, {})
    found = checkpoints.find()
    assert found is not None and found.path.name == "step-1"
    checkpoints.save(FakeEngine(), 2, {})  # leftover files do no harm
    found = checkpoints.find()
    assert found is not None and found.path.name == "step-2"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "engine/model.pt").write_bytes(b"weights" * 50), "350 bytes instead of 700"),
        (lambda p: (p / "engine/model.pt").write_bytes(b"Weights" * 100), "changed after it was saved"),
        (lambda p: (p / "engine/optim.pt").unlink(), "optim.pt is missing"),
        (lambda p: (p / "engine/more.pt").write_bytes(b"x"), "not saved with: engine/more.pt"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_damaged_checkpoint_is_refused_and_the_previous_offered(
    checkpoints: Checkpoints, damage: Callable[[Path], object], reason: str
) -> None:
    checkpoints.save(FakeEngine(), 1, {})
    checkpoints.save(FakeEngine(), 2, {})
    found = checkpoints.find()
    assert found is not None
    damage(found.path)
    with pytest.raises(UserError) as error:
        checkpoints.find()
    assert reason in str(error.value) and "step-1 is good" in str(error.value)


def test_foreign_pickle_is_never_opened(checkpoints: Checkpoints, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    checkpoints.save(FakeEngine(), 1, {})
    found = checkpoints.find()
    assert found is not None
    shutil.rmtree(found.path / "engine")
    (found.path / "engine").mkdir()
    (found.path / "engine/model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="There is no other good checkpoint"):
        checkpoints.find()
    with pytest.raises(Refused):
        read_manifest(found.path)
    assert not (tmp_path / "exploded").exists()


def test_another_kind_of_run_is_refused(checkpoints: Checkpoints, tmp_path: Path, recipe: Recipe) -> None:
    checkpoints.save(FakeEngine(), 1, {})
    other = recipe.model_copy(deep=True)
    other.engine.zero = 2
    with pytest.raises(UserError, match="zero: 1, this run has zero: 2"):
        Checkpoints(tmp_path / "checkpoints", other, OneRank(0, 1, 0, torch.device("cpu"))).find()


@pytest.mark.parametrize("setting", ["zero", "offload"])
def test_another_number_of_ranks_is_refused_where_deepspeed_cannot(
    tmp_path: Path, recipe: Recipe, setting: str
) -> None:
    setattr(recipe.engine, setting, 0 if setting == "zero" else True)
    Checkpoints(tmp_path / "c", recipe, OneRank(0, 1, 0, torch.device("cpu"))).save(FakeEngine(), 1, {})
    with pytest.raises(UserError, match="saved by 1 processes, this run has 2"):
        Checkpoints(tmp_path / "c", recipe, OneRank(0, 2, 0, torch.device("cpu"))).find()


def test_no_checkpoint_is_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.find() is None
