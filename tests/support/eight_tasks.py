"""A recipe with a task of every type, on small files of words that tiny_bert.py knows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

COLORS, PLACES = ["red", "blue", "green"], ["road", "house", "river", "city"]
# The file of each task, of which `write_eight_tasks` makes `<task>-<split>.<ending>`.
ENDINGS = {
    "kind": "tsv",
    "same": "tsv",
    "degree": "tsv",
    "tags": "conll",
    "answer": "jsonl",
    "colors": "csv",
    "next": "jsonl",
    "find": "csv",
}


def write_eight_tasks(directory: Path, rows: dict[str, int]) -> None:
    """Write the files of all tasks, of so many rows for each split.

    The tasks: which color (classification), whether places are the same (binary), how many words
    agree (regression), cars and places (tokens), where a car sat (span), all colors (multilabel),
    what goes with a color (choice), and which sentences fit a color (ranking).
    """
    draw = random.Random(0)
    for split, number in rows.items():
        for task, lines in _files(draw, number).items():
            (directory / f"{task}-{split}.{ENDINGS[task]}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sentence(draw: random.Random) -> str:
    return f"the {draw.choice(COLORS)} car sat in the {draw.choice(PLACES)}"


def _files(draw: random.Random, number: int) -> dict[str, list[str]]:
    kind, same, degree = ["text\tlabel"], ["a\tb\tlabel"], ["a\tb\tlabel"]
    tags: list[str] = []
    answer, chosen = [], []
    colors, find = ["id,text,label"], ["query,passage,number,grade"]
    for row in range(number):
        one, two = _sentence(draw), _sentence(draw)
        kind.append(f"{one}\t{COLORS.index(one.split()[1])}")
        same.append(f"{one}\t{two}\t{int(one.split()[-1] == two.split()[-1])}")
        agree = sum(a == b for a, b in zip(one.split(), two.split(), strict=True))
        degree.append(f"{one}\t{two}\t{agree - 5}")
        labels = ["O", "B-CAR", "I-CAR", "O", "O", "O", "B-PLACE"]
        tags += [*(f"{word} {label}" for word, label in zip(one.split(), labels, strict=True)), ""]
        answer.append(json.dumps({"id": f"q{row}", **_question(draw, one, long=row % 4 == 0)}))
        found = sorted({one.split()[1], two.split()[1]} if row % 5 else set(), key=COLORS.index)
        text = f"{one} and {two}" if found else "the car sat in the house"
        colors.append(f"c{row},{text},{';'.join(found)}")
        wrong = [color for color in COLORS if color != one.split()[1]]
        choices = [f"it is {color}" for color in [one.split()[1], *wrong][: 2 + row % 2]]
        draw.shuffle(choices)
        label = choices.index(f"it is {one.split()[1]}")
        chosen.append(json.dumps({"question": one, "texts": choices, "right": label}))
        query = draw.choice(COLORS)
        for candidate in {0: (one, two), 1: (one, two, _sentence(draw))}[row % 2]:
            grade = int(query in candidate) + int(query in candidate and "road" in candidate)
            find.append(f"{query},{candidate},g{row},{grade}")
        if not any(line.endswith((f"g{row},1", f"g{row},2")) for line in find):
            find.append(f"{query},the {query} car sat in the city,g{row},1")
    return {
        "kind": kind,
        "same": same,
        "degree": degree,
        "tags": tags,
        "answer": answer,
        "colors": colors,
        "next": chosen,
        "find": find,
    }


def _question(draw: random.Random, sentence: str, *, long: bool) -> dict[str, Any]:
    """Return where a car sat. long: a context that needs several windows of 64 tokens."""
    color, place = sentence.split()[1], sentence.split()[-1]
    others = ["the old man ate the soup in the small house", "a dog saw the cat", "she reads the book to the boy"]
    before = [draw.choice(others) for _ in range(draw.randrange(6, 12) if long else 1)]
    after = [draw.choice(others) for _ in range(draw.randrange(3) if long else 0)]
    context = " . ".join([*before, sentence, *after])
    if draw.random() < 0.2:
        return {"question": "was it the road of a woman", "context": context, "answers": []}
    start = len(" . ".join([*before, ""])) + len(sentence) - len(place)
    return {
        "question": f"the {color} car sat in",
        "context": context,
        "answers": [{"text": place, "answer_start": start}],
    }


def eight_tasks() -> dict[str, Any]:
    """Return the section `tasks` of a recipe."""

    def files(task: str, **columns: str) -> dict[str, Any]:
        train, dev = (f"{task}-{split}.{ENDINGS[task]}" for split in ("train", "dev"))
        return {"train": train, "dev": dev, "columns": columns}

    pair = {"text": "a", "text_pair": "b", "label": "label"}
    return {
        "kind": {
            "type": "classification",
            "num_labels": 3,
            "pooling": "mean",
            "data": files("kind", text="text", label="label"),
        },
        "same": {"type": "binary", "data": files("same", **pair)},
        "degree": {
            "type": "regression",
            "range": [0, 2],
            "pairs": "bi",
            "pooling": "mean",
            "data": files("degree", **pair),
        },
        "tags": {
            "type": "tokens",
            "label_names": ["O", "B-CAR", "I-CAR", "B-PLACE"],
            "tokens": {"scheme": "bio"},
            "class_weights": {"O": 0.5},
            "data": files("tags"),
        },
        "answer": {
            "type": "span",
            "span": {"stride": 16, "max_answer": 4, "max_question": 16, "unanswerable": True},
            "data": files("answer", text="question", text_pair="context"),
        },
        "colors": {
            "type": "multilabel",
            "label_names": COLORS,
            "multilabel": {"separator": ";", "thresholds": "tuned"},
            "loss": ["bce", "focal"],
            "class_weights": "balanced",
            "data": files("colors", id="id", text="text", label="label"),
        },
        "next": {
            "type": "choice",
            "data": files("next", text="question", choices="texts", label="right"),
        },
        "find": {
            "type": "ranking",
            "pairs": "bi",
            "pooling": "mean",
            "data": files("find", text="query", text_pair="passage", group="number", label="grade"),
        },
    }
