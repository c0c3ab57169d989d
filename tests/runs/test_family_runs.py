"""A training step of several encoder families through the whole chain, and their predictions."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family_cases
import pytest
import torch
import torch.distributed as distributed
from family_cases import ADDED, CASES, MAX_LENGTH, OTHERS, PAIRS, TEXTS
from launch import cpu_environment
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

import fastmtl
from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.inference.export import export
from fastmtl.model.merge import TrainedModel, join, rename_tasks
from fastmtl.profile.plan import Plan
from fastmtl.training.phases import phases_of
from fastmtl.training.prepare import check_run

WORKER = Path(family_cases.__file__)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("families")
    command = [sys.executable, str(WORKER), str(found)]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return found


@pytest.mark.slow(20)
@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_predictions_are_those_of_transformers_with_the_saved_heads(case: str, directory: Path) -> None:
    outcome: dict[str, Any] = json.loads((directory / "outcomes.json").read_text(encoding="utf-8"))[case]
    assert outcome["error"] is None, outcome["error"]
    model = directory / case / "model"
    auto = AutoModelForTextEncoding if case == "t5" else AutoModel
    encoder, tokenizer = auto.from_pretrained(str(model)).eval(), AutoTokenizer.from_pretrained(str(model))
    takes = inspect.signature(encoder.forward).parameters.keys()
    heads = load_file(model / "heads.safetensors")
    texts = [(text,) for text in TEXTS]
    for task, rows in (("kind", texts), ("same", PAIRS)):
        for row, found in zip(rows, outcome[task], strict=True):
            tokens = tokenizer(*row, return_tensors="pt", truncation="longest_first", max_length=MAX_LENGTH)
            with torch.no_grad():
                hidden = encoder(**{name: tokens[name] for name in tokens.keys() & takes}).last_hidden_state[0]
            vector = hidden[0] if task == "kind" and case != "t5" else hidden.mean(0)
            logits = vector @ heads[f"{task}.dense.weight"].T + heads[f"{task}.dense.bias"]
            expected = (
                logits.softmax(-1) if task == "kind" else torch.stack([1 - logits.sigmoid()[0], logits.sigmoid()[0]])
            )
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
    before = load_file(directory / f"{case}-encoder" / "model.safetensors")
    after = load_file(model / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in after if name in before and "pooler" not in name)


@pytest.mark.slow(20)
def test_tasks_are_added_to_an_encoder_that_is_not_packed(directory: Path) -> None:
    outcome: dict[str, Any] = json.loads((directory / "outcomes.json").read_text(encoding="utf-8"))
    assert outcome[ADDED]["error"] is None, outcome[ADDED]["error"]
    assert all(outcome[ADDED][task] == outcome[OTHERS[0]][task] for task in ("kind", "same"))
    predictor = fastmtl.load(directory / ADDED / "model", device="cpu")
    assert list(predictor.recipe.tasks) == ["kind", "same", "new kind", "new same"]


@pytest.mark.slow(20)
def test_an_encoder_that_is_not_packed_is_merged_and_exported(directory: Path, tmp_path: Path) -> None:
    one, two = (TrainedModel.read(directory / case / "model") for case in (OTHERS[0], ADDED))
    joined = join(rename_tasks(one, {"kind": "first", "same": "second"}), two)
    joined.save(tmp_path / "joined")
    # Both in this process: another number of threads, as of the process that trained, may round
    # otherwise.
    alone = fastmtl.load(directory / OTHERS[0] / "model", device="cpu").predict("kind", TEXTS)
    assert fastmtl.load(tmp_path / "joined", device="cpu").predict("first", TEXTS) == alone
    other = rename_tasks(TrainedModel.read(directory / "megatron" / "model"), {"kind": "a", "same": "b"})
    with pytest.raises(UserError, match="have different encoders: .* is .* and "):
        join(one, other)
    copied = rename_tasks(TrainedModel.read(directory / OTHERS[0] / "model"), {"kind": "a", "same": "b"})
    copied.model.encoder.config.q_groups = 1
    with pytest.raises(UserError, match="have different encoders: q_groups is 4 and 1"):
        join(one, copied)
    notes = export(directory / "t5" / "model", tmp_path / "exported", "sentence-transformers")
    assert notes == [f"pooling: mean; texts are cut at {MAX_LENGTH} tokens"]
    saved, again = (
        load_file(path / "model.safetensors") for path in (directory / "t5" / "model", tmp_path / "exported")
    )
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    with pytest.raises(UserError, match="pooling: pooler needs encoder.implementation: packed"):
        export(directory / "t5" / "model", tmp_path / "pooled", "sentence-transformers", pooling="pooler")


@pytest.fixture
def ends_process_group() -> Iterator[None]:
    """Destroy the process group that a checked recipe has begun."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.slow(20)
@pytest.mark.usefixtures("ends_process_group")
def test_runs_that_need_a_packed_encoder_or_a_first_token_are_refused(directory: Path) -> None:
    recipe = family_cases.recipe_of(directory / "t5-encoder", directory / "data")
    with pytest.raises(UserError, match="tasks.kind.pooling: cls reads a text's first token, and the tokenizer of"):
        check_run(recipe, directory / "unused")
    recipe.tasks["kind"].pooling = "mean"
    line = check_run(recipe, directory / "unused")
    assert line is not None and "(T5EncoderModel of transformers on padded batches)" in line
    with pytest.raises(UserError, match="encoder.implementation: auto runs transformers' own modules, whose memory"):
        Plan(phases_of(recipe)[0], on_gpu=False)
    words = {"name": "words", "objective": "mlm"}
    with pytest.raises(UserError, match="phases.0 .words.: objective: mlm needs a packed encoder"):
        check_run(Recipe.model_validate({**recipe.model_dump(), "phases": [words]}), directory / "unused")
