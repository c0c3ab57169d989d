"""Answers of packed batches equal those of `Predictor.predict`, for all models and tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_models import PAIRS, SENTENCES, save_random_model

import fastmtl
from fastmtl.config import FileConfig
from fastmtl.data.readers import read_file
from fastmtl.errors import UserError
from fastmtl.inference.all_tasks import score_together
from fastmtl.inference.predict import Predictor, predict_all_tasks
from fastmtl.serving.packed import PackedPredictor, warm_up

TASKS: dict[str, dict[str, Any]] = {
    "tone": {"type": "classification", "num_labels": 3, "pooling": "mean", "data": {}},
    "kind": {"type": "binary", "head": {"name": "lstm", "size": 4}, "data": {}},
    "near": {"type": "regression", "range": [0, 5], "pairs": "bi", "data": {}},
    "topics": {"type": "multilabel", "label_names": ["a", "b", "c"], "pooling": "max", "data": {}},
    "tags": {"type": "tokens", "label_names": ["O", "X"], "data": {}},
    "which": {"type": "choice", "data": {}},
    "order": {"type": "ranking", "data": {}},
    "answer": {
        "type": "span",
        "span": {"stride": 4, "max_question": 8},
        "data": {},
    },
}
WORDS = [sentence.split() for sentence in SENTENCES]
CHOICES = [("what ran", ["a dog", "the car", "she"]), ("who", ["he", "a cat"])]
QUESTIONS = [("who ran", "the dog ran to the city and she saw it from the old house by the river " * 4)]
# (texts, tasks) of four requests.
ASKED: list[tuple[list[Any], list[str]]] = [
    (SENTENCES, ["tone", "kind", "topics"]),
    (PAIRS, ["near", "tone"]),
    (WORDS, ["tags"]),
    (SENTENCES[:1], ["kind"]),
    (CHOICES, ["which", "order"]),
    (QUESTIONS, ["answer"]),
]
MODELS: dict[str, Any] = {
    "plain": {"adapter": {"name": "none"}},
    "pal": {"adapter": {"name": "pal", "size": 8, "heads": 2}},
    "lora": {"adapter": {"name": "none"}, "lora": {"rank": 2}},
    "own lora": {"adapter": {"name": "none"}, "lora": {"rank": 2, "tasks": "own"}},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Any:
    folder = tmp_path_factory.mktemp("model")
    return fastmtl.load(save_random_model(folder, tiny_bert, TASKS, **MODELS[request.param]), device="cpu")


def close(ours: Any, theirs: Any) -> None:
    """Compare two predictions: numbers to six digits, everything else exactly."""
    if dataclasses.is_dataclass(ours) and not isinstance(ours, type):
        ours, theirs = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("tokens", [8192, 16], ids=["together", "divided"])
def test_answers_equal_predictions_one_by_one(tokens: int, model: Any) -> None:
    """Requests of one batch, and requests that are larger than a batch."""
    packed = PackedPredictor(model, tokens)
    requests = [packed.encode(texts, tasks) for texts, tasks in ASKED]
    for (texts, tasks), answers in zip(ASKED, packed.predict(requests), strict=True):
        assert list(answers) == tasks
        for task in tasks:
            close(answers[task], model.predict(task, texts))


def test_the_encoder_runs_once_for_all_tasks_of_a_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is in a batch once; with adapters inside of layers once per task."""
    packed, tokens = PackedPredictor(model), []
    encoder = model.model.encoder
    original = encoder.forward
    monkeypatch.setattr(
        encoder,
        "forward",
        lambda batch, *rest, **more: (tokens.append(batch.num_tokens), original(batch, *rest, **more))[1],
    )
    tasks = ["tone", "kind", "topics"]
    requests = [packed.encode(SENTENCES, tasks), packed.encode(SENTENCES[2:], tasks)]
    packed.predict(requests)
    once = sum(len(request.datasets["tone"].tokens) for request in requests)
    expected = once if model.model.runs_encoder_once else 3 * once
    assert tokens == [expected] and sum(request.tokens for request in requests) == expected


def test_a_batch_of_a_large_request_keeps_the_budget(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, tokens = PackedPredictor(model, 60), []
    original = model.model.encoder.forward
    monkeypatch.setattr(
        model.model.encoder,
        "forward",
        lambda batch, *rest, **more: (tokens.append(batch.num_tokens), original(batch, *rest, **more))[1],
    )
    request = packed.encode(SENTENCES * 5, ["tone", "kind", "tags"])
    packed.predict([request])
    assert sum(tokens) == request.tokens and max(tokens) <= 60 < request.tokens


def test_every_task_warms_up(model: Any) -> None:
    warm_up(PackedPredictor(model))


def test_bad_texts_and_tasks(model: Any) -> None:
    packed = PackedPredictor(model)
    with pytest.raises(UserError, match="unknown task 'ton'"):
        packed.encode(["x"], ["ton"])
    with pytest.raises(UserError, match=r"texts\[1\] is not a string"):
        packed.encode(["x", ["y", "z"]], ["tone"])
    with pytest.raises(UserError, match=r"texts\[0\] is one text, but the task takes pairs .*: 'x' \(task near\)"):
        packed.encode(["x"], ["tone", "near"])
    assert not torch.is_grad_enabled() or packed.predict([packed.encode(["x"], ["tone"])])


def test_all_tasks_of_a_file_equal_those_one_by_one(model: Any, tmp_path: Path) -> None:
    """`predict --all-tasks` and `predict --task T` write the same files."""
    files = FileConfig.model_validate({"columns": {"id": "id", "text": "a"}})
    file = tmp_path / "rows.csv"
    file.write_text("id,a\n" + "".join(f'r{row},"{text}"\n' for row, text in enumerate(SENTENCES)))
    tasks = {name: model.recipe.tasks[name].model_copy(update={"data": files}) for name in ("tone", "kind", "topics")}
    recipe = model.recipe.model_copy(update={"tasks": {**model.recipe.tasks, **tasks}})
    assert recipe.task_names == model.recipe.task_names
    few = Predictor(model.model, recipe, model.tokenizer, model.device)
    found = score_together(few, {name: read_file(file, few.task(name), require_labels=False) for name in tasks})
    for name in tasks:
        expected = few.scores(name, read_file(file, few.task(name), require_labels=False))
        np.testing.assert_allclose(found[name].scores, expected.scores, rtol=1e-4, atol=1e-5)
    alone = score_together(few, {"kind": read_file(file, few.task("kind"), require_labels=False)})["kind"]
    np.testing.assert_allclose(alone.scores, found["kind"].scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="task near cannot read it: "):
        predict_all_tasks(few, file, tmp_path / "out")
