"""Train every recipe of the reports for two steps, for test_paper_recipes.py.

All run in one process, since starting a process costs more. Arguments: a directory for everything,
the encoder's directory. Writes DIR/outcomes.json: {recipe: {"error": text or None, "steps": [{task:
loss}], "dev": {task: {metric: value}}}}.
"""

from __future__ import annotations

import csv
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from results_only import results_only

from fastmtl.config import load_recipe
from fastmtl.data.corpus import demo_directory
from fastmtl.loop import train
from fastmtl.recipes.files import bundled_recipes

FILES = {"ids-sst": "sentiment", "ids-cfimdb": "sentiment", "quora": "paraphrase", "sts": "similarity"}
ROWS = {"train": 48, "dev": 12}


def write_data(directory: Path) -> None:
    """Write the first demo rows as the reports' files; CFIMDB: whether sentiment is good."""
    directory.mkdir()
    for name, demo in FILES.items():
        for split, rows in ROWS.items():
            with (demo_directory() / f"{demo}-{split}.csv").open(encoding="utf-8", newline="") as file:
                lines = list(csv.reader(file, delimiter="\t"))[: rows + 1]
            if name == "ids-cfimdb":
                lines[1:] = [[*line[:-1], str(int(int(line[-1]) > 2))] for line in lines[1:]]
            with (directory / f"{name}-{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, delimiter="\t").writerows(lines)


def write_wordnet(directory: Path) -> None:
    """Write a WordNet of one synset, which augmentation needs."""
    directory.mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        noun = part == "noun"
        (directory / f"data.{part}").write_text("00000000 10 n 02 film 0 movie 0 000 | a gloss\n" if noun else "")
        index = "film n 1 0 1 1 00000000  \nmovie n 1 0 1 1 00000000  \n"
        (directory / f"index.{part}").write_text(index if noun else "")


def two_steps(name: str, output: Path, settings: list[str]) -> dict[str, Any]:
    recipe = load_recipe(name, settings)
    train(recipe, output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return {"error": None, "steps": [line["loss"] for line in lines if "loss" in line], "dev": results["dev"]}


def main(directory: Path, encoder: Path) -> None:
    write_data(directory / "data")
    write_wordnet(directory / "wordnet")
    os.environ["WNSEARCHDIR"] = str(directory / "wordnet")
    settings = [f"encoder.path={encoder}", f"data.dir={directory / 'data'}", f"data.cache_dir={directory / 'cache'}"]
    settings += ["train.max_steps=2", "sampler.batch_size=2"]
    outcomes: dict[str, Any] = {}
    for name in bundled_recipes():
        if not name.startswith("papers/"):
            continue
        try:
            outcomes[name] = two_steps(name, directory / "runs" / name, settings)
        except Exception:  # noqa: BLE001 - reported by this recipe's test; the others continue
            outcomes[name] = {"error": traceback.format_exc(), "steps": [], "dev": {}}
        if len(outcomes) == 1:  # freeze all imports, which collections between phases may skip
            gc.freeze()
    (directory / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    with results_only(), mock.patch("os.fsync"):  # waiting for the disk would take as long as some runs' steps
        main(Path(sys.argv[1]), Path(sys.argv[2]))
