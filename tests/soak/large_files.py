"""A file of five million rows: read, tokenised and drawn from in at most 1 GiB of memory.

A new process prepares a run as `fastmtl train` does: it reads and checks the rows, tokenises them
into the cache, builds the model and draws the batches of 5,000 steps. A second process does the
same with the tokens of the cache. The memory is the peak of the process's resident pages, among
them those of memory-mapped files.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random

MOST = 1024  # MiB
STEPS, BATCH_SIZE = 5000, 32  # so many that all pages of the tokens are read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--measure", metavar="DIRECTORY", help="prepare a run in this process and print its figures")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(Path(options.measure), options.rows)))
        return
    from tiny_bert import save_tiny_bert

    with tempfile.TemporaryDirectory(prefix="fastmtl-soak-", dir=Path.cwd()) as name:
        folder = Path(name)
        save_tiny_bert(folder / "encoder")
        write_rows(folder / "rows.csv", options.rows)
        figures = {"rows": options.rows, "MB of the file": round((folder / "rows.csv").stat().st_size / 1e6)}
        for which in ("tokenised", "from the cache"):
            command = [sys.executable, __file__, "--rows", str(options.rows), "--measure", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{which}: {done.stderr[-4000:]}")
            figures[which] = found = json.loads(done.stdout.splitlines()[-1])
            print(which, found, file=sys.stderr)
            peak = max(stage["peak MiB"] for stage in found.values())
            if peak > MOST:
                sys.exit(f"{which}: {peak} MiB resident, at most {MOST} MiB allowed: {found}")
        if [file.name for file in (folder / "cache").iterdir() if not file.name.startswith("tokens-")]:
            sys.exit("files are left in the cache")
    print(json.dumps(figures))


def write_rows(path: Path, rows: int) -> None:
    """Write a CSV file of texts of 8 to 12 words, with labels."""
    from tiny_bert import WORDS

    random = Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for start in range(0, rows, 10_000):
            words = random.choices(WORDS, k=12 * min(10_000, rows - start))
            for at in range(0, len(words), 12):
                file.write(f"{' '.join(words[at : at + random.randint(8, 12)])},{random.randint(0, 1)}\n")


def measured(folder: Path, rows: int) -> dict[str, dict[str, float]]:
    """Prepare a run and draw its first batches; return seconds and peak of memory of each part."""
    found: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # a new peak begins
        begun = time.monotonic()
        yield
        status = Path("/proc/self/status").read_text()
        resident = {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) // 1024 for key in ("VmHWM", "VmRSS")}
        seconds = time.monotonic() - begun
        found[name] = {"seconds": round(seconds, 1), "peak MiB": resident["VmHWM"], "after MiB": resident["VmRSS"]}

    with stage("imports"):
        import fastmtl.training.prepare as training
        from fastmtl.config import Recipe
        from fastmtl.data.corpus import CorpusRows
        from fastmtl.engine.distributed import this_process
    task = {"type": "binary", "data": {"train": "rows.csv", "format": "table", "columns": {"text": 0, "label": 1}}}
    task["data"] |= {"header": True}
    recipe = Recipe.model_validate(
        {
            "tasks": {"tone": task},
            "encoder": {"path": str(folder / "encoder")},
            "data": {"dir": str(folder), "cache_dir": str(folder / "cache")},
            "sampler": {"batch_size": BATCH_SIZE},
        }
    )
    with stage("rows are read"):
        read = CorpusRows.read(recipe)
    with stage("the run is prepared"):
        start = training.prepare(recipe, folder / "run", this_process(None), rows=read)
        assert len(start.corpus.train[0]) == rows
    with stage(f"{STEPS} steps"):
        for _ in islice(start.jobs[0].stream.epoch(0), STEPS):
            pass
    return found


if __name__ == "__main__":
    main()
