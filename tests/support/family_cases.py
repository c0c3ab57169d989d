"""Train encoders of several families for a step and predict, for test_family_runs.py.

All run in one process, since starting a process costs more. Argument: a directory for everything.
Writes DIR/<case>/model and DIR/outcomes.json: {case: {"error": text or None, "kind": [[probability
of each class] of each text], "same": [probability of each pair]}}.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from encoder_families import save_encoder_of
from other_encoders import save_other
from results_only import results_only
from tiny_tokenizers import save_tokenizer

import fastmtl
from fastmtl.config import EncoderConfig, Recipe
from fastmtl.loop import train

# case of encoder_families.py: its tokenizer.
CASES = {
    "roberta": "bytes",
    "xlm-roberta": "unigram",
    "electra": "wordpiece",
    "albert": "unigram",
    "distilbert": "wordpiece",
    "mpnet": "bytes",
    "deberta-v2": "unigram",
    "modernbert": "bytes",
}
# Cases of other_encoders.py, which are not packed. T5 has no [CLS].
OTHERS = ("squeezebert", "megatron", "t5")
ADDED = "added"  # a run that adds a task to the model of the first of them
TEXTS = ["the film was good", "a dull and boring story , not good at all", "he ran", "she reads a lovely book " * 9]
PAIRS = [("a dog ran", "the dog runs"), ("she eats soup", "a car drove to the city"), ("he sat", "he sat on the cat")]
MAX_LENGTH = 20


def write_data(directory: Path) -> None:
    directory.mkdir()
    (directory / "kind.tsv").write_text("a\ty\n" + "".join(f"{t}\t{n % 3}\n" for n, t in enumerate(TEXTS)))
    (directory / "same.tsv").write_text("a\tb\ty\n" + "".join(f"{a}\t{b}\t{n % 2}\n" for n, (a, b) in enumerate(PAIRS)))


def recipe_of(encoder: Path, data: Path) -> Recipe:
    files = {name: {"train": f"{name}.tsv", "dev": f"{name}.tsv"} for name in ("kind", "same")}
    columns = {"text": "a", "label": "y"}
    pair = {**files["same"], "columns": {**columns, "text_pair": "b"}}
    tasks = {
        "kind": {"type": "classification", "num_labels": 3, "data": {**files["kind"], "columns": columns}},
        "same": {"type": "binary", "pooling": "mean", "data": pair},
    }
    return Recipe.model_validate(
        {
            "encoder": {"path": str(encoder), "max_length": MAX_LENGTH},
            "tasks": tasks,
            "data": {"dir": str(data), "cache_dir": str(data / "cache")},
            "gradient": {"method": "pcgrad"},
            "optimizer": {"lr": 1e-3, "head_lr": 1e-1},
            "sampler": {"batch_size": 3},
            "train": {"max_steps": 1},
        }
    )


def outcome(case: str, directory: Path) -> dict[str, Any]:
    encoder = directory / f"{case}-encoder"
    if case in CASES:
        save_encoder_of(case, encoder, vocab_size=340)
        save_tokenizer(CASES[case], encoder)
    elif case != ADDED:
        save_other(case, encoder)
    recipe = recipe_of(encoder, directory / "data")
    if case == "t5":
        recipe.tasks["kind"].pooling = "mean"
        recipe.engine.zero = 3
    if case == ADDED:
        tasks = {f"new {name}": task for name, task in recipe.tasks.items()}
        changes = {"add_to": str(directory / OTHERS[0]), "tasks": tasks, "encoder": EncoderConfig()}
        recipe = recipe.model_copy(update=changes)
    train(recipe, directory / case)
    predictor = fastmtl.load(directory / case / "model", device="cpu")
    found = {"kind": predictor.predict("kind", TEXTS), "same": predictor.predict("same", PAIRS)}
    return {"error": None} | {task: [answer.probabilities for answer in answers] for task, answers in found.items()}


def main(directory: Path) -> None:
    write_data(directory / "data")
    outcomes: dict[str, Any] = {}
    for case in (*CASES, *OTHERS, ADDED):
        try:
            outcomes[case] = outcome(case, directory)
        except Exception:  # noqa: BLE001 - reported by this case's test; the others continue
            outcomes[case] = {"error": traceback.format_exc()}
    (directory / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    with results_only(), mock.patch("os.fsync"):  # waiting for the disk would take as long as the steps
        main(Path(sys.argv[1]))
