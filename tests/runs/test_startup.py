"""The start of a run: refusals before torch or DeepSpeed is imported, and agreement on an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import children_seconds, python_path

from fastmtl.engine.distributed import Ranks, free_port
from fastmtl.errors import UserError

GOOD, BAD = "text,label\ngood,1\nbad,0\nfine,1\ndull,0\n", "text,label\ngood,1\nbad,7\n"
POISON = "raise SystemExit('torch was imported')"


def recipe(directory: Path, rows: str, **sections: Any) -> Path:
    """Return a recipe of one binary task on these CSV rows, in a separate directory."""
    directory.mkdir(exist_ok=True)
    (directory / "mood.csv").write_text(rows, encoding="utf-8")
    task = {"type": "binary", "data": {"train": "mood.csv", "columns": {"text": "text", "label": "label"}}}
    values = {"tasks": {"mood": task}, "data": {"dir": str(directory)}, "gradient": {"method": "pcgrad"}, **sections}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def begin(arguments: list[str], place: Path, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([environment.pop("first", ""), python_path()])
    return subprocess.Popen(
        [sys.executable, "-c", "from fastmtl.cli import main; main()", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path.lstrip(os.pathsep), "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("rank", [{}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}], ids=["alone", "launched"])
def test_a_bad_label_is_told_before_torch_is_imported(tmp_path: Path, rank: dict[str, str]) -> None:
    poisoned = tmp_path / "poisoned"
    for name in ("torch", "transformers", "deepspeed"):
        (poisoned / name).mkdir(parents=True)
        (poisoned / name / "__init__.py").write_text(POISON)
    before = children_seconds()
    run = begin(["train", str(recipe(tmp_path / "data", BAD))], tmp_path, first=str(poisoned), **rank)
    _, message = run.communicate(timeout=60)
    assert message.startswith(f"fastmtl: {tmp_path}/data/mood.csv, line 3, column label: expected a class from 0 to 1")
    assert (run.returncode, message.count("\n")) == (2, 1)
    assert children_seconds() - before < 10  # 1 s


@pytest.mark.slow
def test_a_file_that_is_bad_on_one_host_ends_all_processes_with_one_message(tmp_path: Path) -> None:
    """Rank 1 alone fails, as if its host lacked a file. Rank 0 prints its message."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "DS_ACCELERATOR": "cpu"}
    meeting["OMP_NUM_THREADS"] = "1"
    runs = []
    for rank, rows in enumerate([GOOD, BAD]):
        arguments = ["train", str(recipe(tmp_path / f"host{rank}", rows)), "--output", str(tmp_path / "run"), "--check"]
        runs.append(begin(arguments, tmp_path, RANK=str(rank), LOCAL_RANK="0", **meeting))
    texts = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [2, 2]
    assert f"fastmtl: {tmp_path}/host1/mood.csv, line 3, column label: expected a class" in texts[0]
    assert "fastmtl" not in texts[1] and "Traceback" not in texts[0] + texts[1]
    assert not (tmp_path / "run").exists()


class Gathered(Ranks):
    """Two ranks of which the other has reported an error."""

    other: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_what_ranks_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Gathered(0, 2, 0, "cpu")  # type: ignore[arg-type]
    ranks.agree()
    with pytest.raises(KeyError):
        ranks.agree(KeyError("ours"))
    monkeypatch.setattr(Gathered, "other", (True, ("their file", "their key")))
    for ours in (None, KeyError("ours")):
        with pytest.raises(UserError, match="^their file\ntheir key$"):
            ranks.agree(ours)
    with pytest.raises(UserError, match="^our file$"):
        ranks.agree(UserError("our file"))
    monkeypatch.setattr(Gathered, "other", (False, ()))
    with pytest.raises(SystemExit):
        ranks.agree()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"dir": "nowhere"}}, "data.dir: nowhere: no such directory"),
        ({"sampler": {"name": "proportionl"}}, "unknown sampler 'proportionl'"),
        ({"sampler": {"batch_size": {"moood": 4}}}, "unknown task in sampler.batch_size 'moood'"),
        ({"engine": {"accumulation": 8}}, "the training files hold 4 rows, fewer than the 8 micro-batches"),
        ({"encoder": {"path": "nowhere"}}, "encoder.path: no directory nowhere"),
        ({"engine": {"precision": "fp16", "zero": 1}}, "engine.precision: fp16 needs a GPU"),
        ({"adapter": {"name": "lorra"}}, "unknown adapter 'lorra'"),
        ({"gradient": {"method": "pcgrd"}}, "Did you mean 'pcgrad'?"),
        ({"gradient": {"method": "gradvac", "reduce": "local"}}, "reduce='local': every rank would solve for itself"),
        ({"early_stopping": {"patience": 1}}, "no task has a dev file"),
        ({"deepspeed": {"zero_optimization": {"reduce_bucket_size": "x"}}}, "deepspeed.zero_optimization.reduce_buck"),
        ({"gradient": {"method": "cagrad", "options": {"c": [1]}}}, "gradient.options {'c': [1]} cannot weigh 1 tasks"),
    ],
)
def test_what_a_run_cannot_have_is_refused_before_deepspeed_starts(
    sections: dict[str, Any], message: str, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmtl import loop
    from fastmtl.config import load_recipe
    from fastmtl.training import prepare

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("DeepSpeed was started")

    monkeypatch.setattr(prepare, "join", never)
    world = 2 if "reduce" in sections.get("gradient", ()) else 1
    monkeypatch.setattr(loop, "this_process", lambda _: Ranks(0, world, 0, loop.torch.device("cpu")))
    given = recipe(tmp_path / "data", GOOD, **{"encoder": {"path": str(tiny_bert)}, **sections})
    with pytest.raises(UserError) as caught:
        loop.train(load_recipe(str(given)), tmp_path / "run")
    assert message in str(caught.value)


def test_a_full_disk_is_told_before_deepspeed_starts(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmtl import loop
    from fastmtl.config import load_recipe
    from fastmtl.training import prepare

    asked: list[tuple[Path, int]] = []

    def full(directory: Path, needed: int) -> None:
        asked.append((directory, needed))
        raise UserError("no space")

    monkeypatch.setattr(prepare, "check_room", full)
    given = load_recipe(str(recipe(tmp_path / "data", GOOD, encoder={"path": str(tiny_bert)})))
    with pytest.raises(UserError, match="no space"):
        loop.train(given, tmp_path / "run")
    weights = sum(tensor.numel() for tensor in prepare.PhaseModel(prepare.phases_of(given)[0]).trained.parameters())
    assert asked == [(tmp_path / "run", 14 * weights)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a single process without other ranks."""
    from fastmtl import cli
    from fastmtl.training import prepare

    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr(prepare, "this_process", lambda _: Ranks(0, 1, 0, torch.device("cpu")))
    monkeypatch.setattr(prepare, "join", lambda _: None)
    monkeypatch.delenv("RANK", raising=False)


def check(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Return the exit status of `fastmtl train --check`."""
    from fastmtl import cli

    monkeypatch.setattr(sys, "argv", ["fastmtl", "train", "--check", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_check_says_in_one_line_what_it_checked_and_writes_nothing(
    tmp_path: Path, tiny_bert: Path, alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"dir": str(tmp_path / "data"), "on_bad_row": "skip", "cache_dir": str(tmp_path / "cache")}
    given = recipe(tmp_path / "data", GOOD + "odd,7\n", encoder={"path": str(tiny_bert)}, data=data)
    assert check(monkeypatch, str(given), "--output", str(tmp_path / "run")) == 0
    told = capsys.readouterr()
    parts = f"1 task, 1 file, 4 rows (1 bad one skipped), encoder {tiny_bert}, 1 process"
    assert told.out == f"checked, nothing was trained: {parts}\n" and told.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "Did you mean 'train.epochs'?"),
        ("tasks.mood.data.train=other.csv", "other.csv: no such file"),
        ("encoder.path=nowhere", "encoder.path: no directory nowhere"),
        ("tasks.mood.pairs=bi", "pairs: bi needs two texts per row"),
    ],
)
def test_check_tells_what_a_start_would_tell(
    override: str,
    message: str,
    tmp_path: Path,
    tiny_bert: Path,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = recipe(tmp_path / "data", GOOD, encoder={"path": str(tiny_bert)})
    assert check(monkeypatch, str(given), override, "--output", str(tmp_path / "run")) == 2
    told = capsys.readouterr()
    assert told.out == "" and message in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_deepspeeds_shared_memory_operator_is_not_built(tmp_path: Path) -> None:
    code = (
        "from fastmtl.engine.distributed import start; ranks = start()\n"
        "from deepspeed.comm import comm; import torch.distributed as dist\n"
        "print(comm.cdb.shm_comm_op, dist.is_initialized(), ranks.world)"
    )
    environment = {**os.environ, "PYTHONPATH": python_path(), "DS_ACCELERATOR": "cpu"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1:] == ["None True 1"], done.stderr
    assert list(tmp_path.iterdir()) == []
