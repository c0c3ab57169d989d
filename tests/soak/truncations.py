"""Every file of a checkpoint and of model/, truncated at many places: refused, never loaded.

The refusal must give the reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from phase_cases import make_recipe, write_data
from tiny_bert import save_tiny_bert

from fastmtl.config import Recipe
from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import Ranks
from fastmtl.errors import UserError
from fastmtl.loop import train
from fastmtl.model.saved_model import load_model


def offsets_of(size: int, count: int) -> list[int]:
    """Return at most `count` lengths below `size`, the first and the last included."""
    return sorted({index * (size - 1) // max(count - 1, 1) for index in range(count)}) if size else []


def same_text(whole: bytes, cut: bytes) -> bool:
    """Return True if only white space at the end of a text is missing."""
    return cut.rstrip() == whole.rstrip() and len(whole) - len(cut) <= 2


def cut_checkpoint(run: Path, recipe: Recipe, ranks: Ranks, count: int) -> int:
    """Return the number of refused cuts; the previous checkpoint must be offered each time."""
    newest, before = run / "checkpoints" / "step-6", run / "checkpoints" / "step-3"
    done = 0
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for offset in offsets_of(len(whole), count):
            path.write_bytes(whole[:offset])
            try:
                Checkpoints(run / "checkpoints", recipe, ranks).find()
            except UserError as error:
                if path.name not in str(error) or f"{before} is good" not in str(error):
                    sys.exit(f"{path} cut at {offset}: the message is {error}")
                done += 1
            else:
                if path.name != "manifest.json" or not same_text(whole, whole[:offset]):
                    sys.exit(f"{path} cut at {offset} of {len(whole)} bytes was taken")
        path.write_bytes(whole)
    return done


def cut_model(model: Path, count: int) -> int:
    """Return the number of truncations that were refused by a message with the file's name."""
    done = 0
    for path in sorted(path for path in model.iterdir() if path.is_file()):
        whole = path.read_bytes()
        for offset in offsets_of(len(whole), count):
            path.write_bytes(whole[:offset])
            try:
                load_model(model)
            except UserError as error:
                if path.name not in str(error) and "tokenizer" not in str(error):
                    sys.exit(f"{path} cut at {offset}: the message is {error}")
                done += 1
            else:
                if not same_text(whole, whole[:offset]):
                    sys.exit(f"{path} cut at {offset} of {len(whole)} bytes was taken")
        path.write_bytes(whole)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offsets", type=int, default=100)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="fastmtl-soak-"))
    try:
        bert = save_tiny_bert(directory / "bert", hidden=16, layers=1, heads=2)
        write_data(directory)
        recipe = make_recipe(directory, bert, [], train={"checkpoint_every": 3})
        train(recipe, directory / "run")
        ranks = Ranks(0, 1, 0, device=next(iter(load_model(directory / "run" / "model")[0].parameters())).device)
        found = {"of a checkpoint": cut_checkpoint(directory / "run", recipe, ranks, options.offsets)}
        found["of model/"] = cut_model(directory / "run" / "model", options.offsets)
    finally:
        shutil.rmtree(directory)
    print(json.dumps({f"cuts {name} refused": number for name, number in found.items()}))


if __name__ == "__main__":
    main()
