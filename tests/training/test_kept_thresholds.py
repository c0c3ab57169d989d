"""Thresholds of a saved model: those of the epoch whose weights it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_batches import build_model
from scored import scored

from fastmtl.data.corpus import Corpus
from fastmtl.engine.distributed import Ranks
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.multilabel import tuned_thresholds
from fastmtl.model.encoder.pretrained import load_tokenizer
from fastmtl.model.saved_model import read_about
from fastmtl.training.phases import phases_of
from fastmtl.training.run_files import RunFiles


def drawn(seed: int) -> Scores:
    random = np.random.default_rng(seed)
    labels = (random.random((9, 2)) < 0.5).astype(np.float32)
    return scored(random.random((9, 2)).astype(np.float32), labels)


def thresholds(scores: Scores) -> list[float]:
    assert scores.labels is not None
    return tuned_thresholds(scores.scores, scores.labels).tolist()


def test_a_task_that_keeps_its_weights_keeps_its_thresholds(tiny_bert: Path, tmp_path: Path) -> None:
    task = {
        "type": "multilabel",
        "label_names": ["a", "b"],
        "multilabel": {"thresholds": "tuned"},
        "data": {"train": "t.csv", "dev": "d.csv"},
    }
    phases: Any = [{"name": "heads", "trains": "heads", "keep": "best_of_each"}]
    model = build_model(tiny_bert, tasks={"one": task, "two": task}, phases=phases)
    (phase,) = phases_of(model.recipe)
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    files = RunFiles(tmp_path, model.recipe, load_tokenizer(model.recipe.encoder), Corpus([], []), ranks)
    first = {"one": drawn(0), "two": drawn(1)}
    files.keep(phase, first, model.state_dict(), model, ["one", "two"])
    second = {"one": drawn(2), "two": drawn(3)}
    files.keep(phase, second, model.state_dict(), model, ["two"])
    tasks = read_about(tmp_path / "model")[0].tasks
    assert tasks["one"].multilabel.thresholds == thresholds(first["one"])
    assert tasks["two"].multilabel.thresholds == thresholds(second["two"]) != thresholds(first["two"])
    assert (tmp_path / "predictions" / "one-dev.csv").is_file()
    assert "thresholds: tuned" in (tmp_path / "config.yaml").read_text(encoding="utf-8")
