"""The model card: metadata that huggingface_hub reads, and a table of the tasks."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from fastmtl.config import Recipe
from fastmtl.inference.model_card import write_card


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    files = {"train": "x.csv", "dev": "dev/reviews.csv"}
    tasks = {
        "tone": {"type": "classification", "label_names": ["bad | poor", "good"], "data": files},
        "near": {"type": "regression", "range": [0, 5], "data": {"train": "x.csv"}},
        "people": {"type": "tokens", "label_names": ["O", "B-X", "I-X"], "tokens": {"scheme": "bio"}, "data": files},
    }
    recipe = Recipe.model_validate({"description": "Reviews: all of them", "tasks": tasks})
    dev = {"tone": {"accuracy": 0.91234, "macro_f1": 0.9}, "people": {"f1": 0.5}}
    write_card(tmp_path, recipe, dev)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "fastmtl" and card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["fastmtl", "multi-task", "text-classification", "token-classification"]
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    found = [(r.task_type, r.task_name, r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [
        ("text-classification", "tone", "reviews.csv", "accuracy", 0.9123),
        ("text-classification", "tone", "reviews.csv", "macro_f1", 0.9),
        ("token-classification", "people", "reviews.csv", "f1", 0.5),
    ]
    assert "| tone | classification | bad \\| poor, good | accuracy 0.912 |" in card.text
    assert "| near | regression | 0 to 5 |  |" in card.text


def test_a_model_without_scores_has_a_card(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"tasks": {"x": {"type": "binary", "data": {}}}, "encoder": {"path": "/home/me/bert"}}
    )
    write_card(tmp_path, recipe, {})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and card.data.base_model is None
    assert "| encoder | bert |" in card.text and "/home/me" not in card.text
