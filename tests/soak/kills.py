"""kill -9 at random moments of a two-process run; all runs end with equal results.

A run is killed and resumed until it ends, then the next one begins, up to --kills kills. Each run
must leave the metrics, weights, scores and random states of a run that was not killed, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from launch import two_processes
from left_by_run import lasting
from phase_cases import make_recipe, write_data
from tiny_bert import save_tiny_bert

EARLY, SAVING = 0.15, 0.25  # shares of the kills before the first step, and during a checkpoint
DEADLINE = 300.0  # seconds for one launch


class Launch:
    """One `deepspeed fastmtl train --resume`, with its output in a file beside the run."""

    def __init__(self, recipe: Path, run: Path) -> None:
        self.run, self.log = run, run.with_suffix(".log")
        command = [*two_processes(), "--no_python", "fastmtl", "train", str(recipe), "--output", str(run), "--resume"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.begun = time.monotonic()

    def wait_for_training(self) -> None:
        """Wait for a rank's first progress line, or the end."""
        while self.process.poll() is None and "epoch" not in self.log.read_text(errors="replace"):
            self.check_deadline()
            time.sleep(0.01)

    def wait_for_saving(self) -> None:
        """Wait until a checkpoint is being written, or the end."""
        while self.process.poll() is None and not any((self.run / "checkpoints").glob(".*-step-*")):
            self.check_deadline()
            time.sleep(0.001)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def kill(self) -> None:
        """Kill the ranks first: a rank without its launcher would save and stop."""
        everything = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [one for one in everything if _environment(one).get("RANK")]
        random.shuffle(ranks)
        for process in [*ranks, *everything]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(everything, timeout=30)

    def check_deadline(self) -> None:
        if time.monotonic() - self.begun > DEADLINE:
            self.kill()
            sys.exit(f"no progress in {DEADLINE:.0f} s: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def finish(launch: Launch) -> float:
    """Return the seconds from the first step to the end. Exit if the run fails."""
    launch.wait_for_training()
    begun = time.monotonic()
    while launch.process.poll() is None:
        launch.check_deadline()
        time.sleep(0.05)
    if launch.process.returncode:
        sys.exit(f"exit status {launch.process.returncode}: {launch.tail()}")
    return time.monotonic() - begun


def left(run: Path) -> dict[str, Any]:
    """Return what must be equal: metrics, bytes of weights, predictions and random states."""
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    files = [*(run / "model").iterdir(), *(run / "predictions").iterdir(), *newest.glob("random-*")]
    return {"metrics": lasting(run), **{str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    random.seed(options.seed)
    directory = Path(tempfile.mkdtemp(prefix="fastmtl-soak-"))
    write_data(directory)
    bert = save_tiny_bert(directory / "bert", hidden=16, layers=1, heads=2)
    sections: dict[str, Any] = {"train": {"epochs": 12, "checkpoint_every": 2}, "sampler": {"batch_size": 4}}
    recipe = make_recipe(directory, bert, [], **sections)
    file = directory / "recipe.yaml"
    file.write_text(recipe.dump(), encoding="utf-8")

    whole = Launch(file, directory / "whole")
    seconds = finish(whole)
    startup = time.monotonic() - whole.begun - seconds
    expected = left(directory / "whole")
    kills = runs = saving = 0
    run = directory / "run-0"
    while True:
        launch = Launch(file, run)
        if kills < options.kills:
            moment = random.random()
            if moment < EARLY:
                launch.wait(random.uniform(0, startup))
            else:
                launch.wait_for_training()
                launch.wait(random.uniform(0, seconds / 3))
            if moment > 1 - SAVING:
                launch.wait_for_saving()
                launch.wait(random.uniform(0, 0.05))
        if kills < options.kills and launch.process.poll() is None:
            launch.kill()
            kills += 1
            saving += any((run / "checkpoints").glob(".*-step-*"))
            continue
        finish(launch)
        found = left(run)
        differs = [name for name in expected if found.get(name) != expected[name]]
        if differs or found.keys() != expected.keys():
            sys.exit(f"seed {options.seed}: after {kills} kills {run} differs in {differs or found.keys()}")
        runs += 1
        if kills >= options.kills:
            break
        shutil.rmtree(run)
        run = directory / f"run-{runs}"
    shutil.rmtree(directory)
    print(json.dumps({"kills": kills, "while saving": saving, "runs equal to the bit": runs, "seed": options.seed}))


if __name__ == "__main__":
    main()
