"""Write a corpus whose tasks pull one small encoder apart, a recipe, and a random encoder.

Usage: python tools/make_conflict_corpus.py DIR [--conflict 0.5] [--seed 1]

A text is a word that names the task and ten words in random order: four of one topic, four of one
style, and two of praise or blame. There are three tasks.

| task | texts | label | train rows | loss |
|---|---|---|---|---|
| topic | a pair | 5 if both have the same topic, else 0 | 2400 | squared error on 0 to 5 |
| style | a pair | 2 if both have the same style, else 0 | 600 | squared error on 0 to 2 |
| verdict | one | good or bad | 1200 | cross-entropy |

The heads of topic and style have no weights: a score is the cosine of the vectors of two texts. In
some pairs the two tasks disagree (one topic in two styles, or two topics in one style); in all
others they agree. The degree C is the share of the pairs that disagree:

- C = 0: both tasks need the same vectors.
- C = 0.5: topic and style are independent.
- C = 1: where topic needs a cosine of 1, style needs 0.

The word that names the task makes all tasks solvable at once for every C, but only for an encoder
that has learned to use it. Until then, what helps one task harms the other in the pairs that
disagree. The sizes and the scales of the losses differ as well. Dev rows are drawn like train rows.

The same call writes the same bytes; the texts depend on C and the seed only. `encoder/` is a BERT
with two layers of 32 columns and random weights.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

ROWS = {"topic": (2400, 300), "style": (600, 300), "verdict": (1200, 300)}
HIGHEST = {"topic": 5, "style": 2}

TOPICS = [
    "sea boat wave sail harbour fish anchor tide".split(),
    "kitchen bread oven soup salt butter spoon recipe".split(),
    "court judge law trial witness prison lawyer jury".split(),
    "music song violin choir drum melody concert opera".split(),
    "garden rose tree seed spade lawn leaf hedge".split(),
    "train station rail ticket platform engine signal tunnel".split(),
]
STYLES = [
    "hence thus whereas moreover hereby notwithstanding therein pursuant".split(),
    "yeah okay gonna wanna kinda dude stuff hey".split(),
    "thee thou hath doth unto verily behold ere".split(),
    "perhaps maybe possibly seemingly apparently arguably presumably likely".split(),
    "now quick hurry instantly urgent immediately fast rush".split(),
    "percent average ratio total median rate figure estimate".split(),
]
VERDICTS = {
    "good": "lovely superb pleasant splendid charming fine delightful excellent".split(),
    "bad": "awful dreadful nasty horrible poor feeble dismal wretched".split(),
}

RECIPE = """\
description: Three tasks on one random BERT of two layers, degree of conflict {conflict:g} (make_conflict_corpus.py).
seed: 1
data: {{dir: {folder}}}
encoder: {{path: {folder}/encoder, hidden_dropout: 0.0, attention_dropout: 0.0}}
tasks:
  topic:
    type: regression
    range: [0, 5]
    data:
      train: topic-train.tsv
      dev: topic-dev.tsv
      columns: &pair {{id: id, text: text, text_pair: text_pair, label: label}}
    pairs: bi
    pooling: mean
    head: {{name: cosine, dropout: 0.0}}
  style:
    type: regression
    range: [0, 2]
    data: {{train: style-train.tsv, dev: style-dev.tsv, columns: *pair}}
    pairs: bi
    pooling: mean
    head: {{name: cosine, dropout: 0.0}}
  verdict:
    type: classification
    label_names: [bad, good]
    data: {{train: verdict-train.tsv, dev: verdict-dev.tsv, columns: {{id: id, text: text, label: label}}}}
    pooling: mean
    head: {{dropout: 0.0}}
sampler: {{name: round_robin, batch_size: 16, steps_per_epoch: 250}}
optimizer: {{lr: 6.0e-3, head_lr: 6.0e-3}}
train: {{epochs: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a corpus whose tasks conflict, a recipe and a small encoder.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--conflict", metavar="C", type=degree, default=0.5, help="from 0 to 1 (default: 0.5)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    write_corpus(given.folder, given.conflict, given.seed)
    write_encoder(given.folder / "encoder", given.seed)
    print(f"fastmtl train {given.folder / 'recipe.yaml'}")


def degree(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a degree of conflict is from 0 to 1")
    return value


def write_corpus(folder: Path, conflict: float, seed: int = 1) -> None:
    """Write the files of the tasks and recipe.yaml. conflict: share of the pairs that disagree."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, sizes in ROWS.items():
        for split, number in zip(("train", "dev"), sizes, strict=True):
            draw = random.Random(f"{seed} {task} {split}")
            rows = verdicts(number, draw) if task == "verdict" else pairs(task, number, conflict, draw)
            header = "id\ttext\tlabel" if task == "verdict" else "id\ttext\ttext_pair\tlabel"
            lines = [header, *("\t".join([f"{task}-{split}-{number}", *row]) for number, row in enumerate(rows))]
            (folder / f"{task}-{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = json.dumps(folder.resolve().as_posix(), ensure_ascii=False)[1:-1]
    (folder / "recipe.yaml").write_text(RECIPE.format(conflict=conflict, folder=place), encoding="utf-8")


def pairs(task: str, number: int, conflict: float, draw: random.Random) -> list[list[str]]:
    """Return rows of two texts and a label, of which round(conflict * number) disagree."""
    disagreeing = round(conflict * number)
    rows = []
    for row in range(number):
        same = {"topic": draw.random() < 0.5}
        same["style"] = same["topic"] != (row < disagreeing)
        topics, styles = (draw.sample(range(6), 2) for _ in range(2))
        first = text(task, topics[0], styles[0], draw.choice(list(VERDICTS)), draw)
        second = text(task, topics[not same["topic"]], styles[not same["style"]], draw.choice(list(VERDICTS)), draw)
        rows.append([first, second, str(HIGHEST[task] * same[task])])
    draw.shuffle(rows)
    return rows


def verdicts(number: int, draw: random.Random) -> list[list[str]]:
    """Return rows of a text and its verdict."""
    found = [draw.choice(list(VERDICTS)) for _ in range(number)]
    return [[text("verdict", draw.randrange(6), draw.randrange(6), label, draw), label] for label in found]


def text(task: str, topic: int, style: int, verdict: str, draw: random.Random) -> str:
    words = [
        *draw.choices(TOPICS[topic], k=4),
        *draw.choices(STYLES[style], k=4),
        *draw.choices(VERDICTS[verdict], k=2),
    ]
    draw.shuffle(words)
    return " ".join([f"task{task}", *words])


def write_encoder(folder: Path, seed: int = 1) -> None:
    """Write a BERT with random weights and a vocabulary of the corpus' words."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    words = [word for group in (*TOPICS, *STYLES, *VERDICTS.values()) for word in group]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"task{task}" for task in ROWS), *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(seed)
    save_file(BertModel(config, add_pooling_layer=False).state_dict(), folder / "model.safetensors")
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
