"""The benchmark of surgery on models of transformers: every way in a tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fastmtl import cli
from fastmtl.bench.models import run, ways
from fastmtl.bench.models.workload import MODELS, ModelWorkload, shape_of
from fastmtl.bench.oracle import GradientMismatch, Oracle
from fastmtl.bench.sizes import Size
from fastmtl.errors import UserError
from fastmtl.measure.harness import MIB
from fastmtl.surgery import GradientSurgery


def bench(*arguments: str) -> None:
    cli.app(["bench", "surgery", "--rounds", "1", "--shape", "tiny", *arguments], standalone_mode=False)


@pytest.mark.parametrize("model", [*MODELS, "vit --same-rows"])
def test_every_way_has_the_gradients_of_the_textbook_loop(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Peaks are made up: a process for each takes seconds, and test_bench.py measures some."""
    monkeypatch.setattr(run, "in_own_process", lambda _, name, *__, preload: (100 + len(name)) * MIB)
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "model.json"
    bench("--model", *model.split(), "--json", str(file))
    model = model.replace(" --same-rows", ", same rows")
    result = json.loads(file.read_text())
    assert set(result["variants"]) == set(ways.WAYS) and not result["skipped"]
    assert result["benchmark"] == f"surgery {model}"
    for name, entry in result["variants"].items():
        assert entry["error"] <= (1e-2 if name == "textbook" or name.startswith("torchjd") else 1e-5)
        assert entry["peak_above_joint_mib"] == len(name) - len("joint")
        assert (entry["j_mib"] is not None) == (name in ways.STACKED)
    printed = capsys.readouterr().out
    assert f"{model}, tiny in fp32, 3 tasks, {result['tokens']} tokens ({result['padded_tokens']} padded)" in printed


def test_a_way_in_bf16_and_many_tasks() -> None:
    tiny = shape_of("hf-bert", "tiny")
    workload = ModelWorkload("hf-bert", Size(tiny, tasks=5, precision="bf16"))
    variant = ways.build("one pass", workload)
    assert {parameter.dtype for parameter in variant.model.parameters()} == {torch.bfloat16}
    assert 1e-3 < Oracle(workload).check(variant) < 0.1  # rounding errors only


def test_a_way_without_its_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task's rows are given to the first one."""
    workload = ModelWorkload("vit", Size(shape_of("vit", "tiny")))
    right = GradientSurgery.rows

    def wrong(self: GradientSurgery, rows: dict[str, int]) -> object:
        return right(self, [0] * 3 + [1] * 5 + [2] * 4)

    monkeypatch.setattr(GradientSurgery, "rows", wrong)
    with pytest.raises(GradientMismatch, match=r"^one pass: the gradient of encoder\.\S+ is not the textbook loop's"):
        Oracle(workload).check(ways.build("one pass", workload))


def test_what_cannot_be_measured_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--shape bert-base: --model vit has the shapes vit-s16, tiny"):
        cli.app(["bench", "surgery", "--model", "vit", "--shape", "bert-base"], standalone_mode=False)
    with pytest.raises(UserError, match="--shape vit-s16: fastmtl's encoder has the shapes minilm, bert-base, tiny"):
        cli.app(["bench", "surgery", "--shape", "vit-s16"], standalone_mode=False)
    with pytest.raises(UserError, match="--model excludes --sweep and --tokens"):
        bench("--model", "vit", "--sweep")
    with pytest.raises(UserError, match="--way needs --model"):
        bench("--way", "one pass")
    with pytest.raises(UserError, match="--same-rows needs --model"):
        bench("--same-rows")
    with pytest.raises(UserError, match="--way.*two passes"):
        bench("--model", "vit", "--way", "two passes")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--model llama-lora needs PEFT.*pip install 'fastmtl-torch\[bench\]'"):
        bench("--model", "llama-lora")
