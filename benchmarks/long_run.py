"""A long run through DeepSpeed's launcher, with checks of loss, memory, speed and resume.

    python benchmarks/long_run.py --data DIR --output DIR [--precision bf16] [--stop-at 1000]
                                  [--json FILE]

Recipe cs224n (its files are in --data; without it recipe demo on the bundled corpus) with PCGrad,
stacked task gradients and ZeRO-1 on processes of the CPU. `straight` is a run of --steps optimiser
steps. `stopped` is the same, but its processes get SIGTERM at --stop-at, continue by --resume and
are stopped again at twice that step, if there is one. The logs of both must be equal bit for bit. A
finished part is not repeated.

Processes are watched from outside, ten times per second. A step's resident memory is the highest
one (the kernel's VmHWM, reset at each sample) while the step was the newest in metrics.jsonl;
medians of 50 steps are compared. If tokens/s fall, CPU seconds per step decide, because on a shared
machine only CPU seconds show the cost of a step.

A run maps large blocks of memory, in huge pages if Linux provides them (fastmtl/measure/heap.py).
MALLOC_* variables before the command override this.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fastmtl.engine.distributed import free_port
from fastmtl.measure.harness import MIB, peak_bytes, reset_peak_bytes
from fastmtl.tracking.metrics_file import read_metrics

WINDOW = 50  # steps; memory is compared with the window after the first one
MEMORY = 1.02  # largest ratio of a later window to the first
SPEED = 0.85  # least ratio of tokens/s, last to first quarter; of CPU seconds, first to last
CLOCKS = ("time", "tokens_per_second", "surgery_seconds")


def step_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def losses(lines: list[dict[str, Any]], steps: int) -> tuple[dict[str, Any], list[str]]:
    """Return a summary of the losses, and complaints. metrics.jsonl has null for inf and NaN."""
    found = [line["step"] for line in lines]
    bad = [n["step"] for n in lines if n["skipped"] or None in (*n["loss"].values(), n["merged_norm"])]
    complaints = [] if found == list(range(1, steps + 1)) else [f"{len(found)} steps were logged, not 1 to {steps}"]
    complaints += [f"a loss or gradient is not finite at step {bad[0]}, {len(bad)} steps in all"] if bad else []
    sums = [sum(filter(None, line["loss"].values())) for line in lines]
    return {"steps": len(found), "first": _median(sums[:WINDOW]), "last": _median(sums[-WINDOW:])}, complaints


def memory(samples: list[dict[str, Any]], steps: int) -> tuple[dict[str, Any], list[str]]:
    """Return the resident MiB of each rank, and complaints.

    Samples after the last step (evaluation, saving) are left out, samples between steps are not.
    """
    highest: dict[int, list[float]] = {}
    for sample in samples:
        if WINDOW <= sample["step"] < steps:
            before = highest.get(sample["step"], sample["rss"])
            highest[sample["step"]] = [max(pair) for pair in zip(before, sample["rss"], strict=True)]
    number, ranks = np.array(list(highest)), np.array(list(highest.values()))
    parts = [ranks[(number >= at) & (number < at + WINDOW)] for at in range(WINDOW, steps, WINDOW)]
    windows = np.array([np.median(part, axis=0) for part in parts if len(part)])
    first, most = windows[0], windows.max(axis=0)
    found = {
        "at_50": first.round(1).tolist(),
        "most": most.round(1).tolist(),
        "peak": ranks.max(axis=0).round(1).tolist(),
        "per_1000_steps": (1000 * np.polyfit(number, ranks, 1)[0]).round(2).tolist(),
        "windows": windows.round(1).tolist(),
    }
    grown = most > MEMORY * first
    return found, [
        f"rank {r}'s memory has grown from {first[r]:.0f} to {most[r]:.0f} MiB" for r in np.flatnonzero(grown)
    ]


def speed(lines: list[dict[str, Any]], samples: list[dict[str, Any]], steps: int) -> tuple[dict[str, Any], list[str]]:
    """Return medians by quarter (tokens/s of all ranks, CPU seconds per step and rank) and
    complaints.
    """
    at = {
        sample["step"]: statistics.mean(sample["cpu"]) for sample in reversed(samples)
    }  # the first sample of each step
    spent = {step: at[step] - at[step - 1] for step in at if step - 1 in at and step > 1}
    quarters = [(round(steps * q / 4), round(steps * (q + 1) / 4)) for q in range(4)]
    tokens = [_median([n["tokens_per_second"] for n in lines if a < n["step"] <= b]) for a, b in quarters]
    cpu = [_median([s for step, s in spent.items() if a < step <= b]) for a, b in quarters]
    spread = np.quantile([line["tokens_per_second"] for line in lines], [0.1, 0.9]).round(1).tolist()
    slower, dearer = tokens[3] < SPEED * tokens[0], cpu[3] * SPEED > cpu[0]
    found = {"tokens_per_second": tokens, "from_10_to_90_percent": spread, "cpu_seconds": cpu}
    found["judged_by"] = "cpu_seconds" if slower else "tokens_per_second"
    fell = f"tokens/s fell from {tokens[0]:.0f} to {tokens[3]:.0f} and a step's CPU seconds rose"
    return found, [f"{fell} from {cpu[0]:.2f} to {cpu[3]:.2f}"] if slower and dearer else []


def resumed(
    straight: list[dict[str, Any]], stopped: list[dict[str, Any]], stops: list[int], end: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the comparison of both runs, and complaints.

    Equal lines are equal losses, cosines, norms and learning rates, hence equal weights, data,
    dropout and schedule.
    """
    both = [[{k: v for k, v in line.items() if k not in CLOCKS} for line in run] for run in (straight, stopped)]
    pairs = list(zip(*both, strict=False))
    differs = [a["step"] for a, b in pairs if a != b]
    complaints = [f"the resumed run differs from step {differs[0]} on"] if differs else []
    complaints += [] if len(stopped) >= end else [f"the resumed run ended at step {len(stopped)}, before {end}"]
    return {"stopped_at": stops, "equal_steps": len(pairs) - len(differs), "steps": len(stopped)}, complaints


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3) if values else float("nan")


class Watched:
    """One `fastmtl train` under the launcher, with its log and the samples of its processes."""

    def __init__(self, command: list[str], run: Path) -> None:
        self.command, self.run = command, run
        self.samples: list[Any] = []
        self.stops: list[Any] = []

    def go(self, stop_at: int | None = None) -> None:
        """Run to the end, or to a SIGTERM at step `stop_at`. Exit if the run fails."""
        more = ["--resume"] if self.run.exists() else []
        path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
        with self.run.with_suffix(".log").open("a") as log:
            process = subprocess.Popen([*self.command, *more], stdout=log, stderr=log, env=environment)
        ranks: list[psutil.Process] = []
        steps, signalled = self.steps(), False
        while process.poll() is None:
            time.sleep(0.1)
            try:
                if self.steps() > steps and not ranks:
                    everything = psutil.Process(process.pid).children(recursive=True)
                    ranks = [one for one in everything if "train" in one.cmdline() and "RANK" in one.environ()]
                    ranks.sort(key=lambda one: one.environ()["RANK"])
                if ranks and not signalled:
                    sample = self._sample(ranks)
                    if all(sample["rss"]):  # an ended process has none
                        self.samples.append(sample)
            except psutil.NoSuchProcess:
                continue
            if ranks and stop_at is not None and not signalled and self.steps() >= stop_at:
                signalled = True
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
        if process.returncode:
            sys.exit(f"exit status {process.returncode}: see {self.run.with_suffix('.log')}")
        if signalled:
            self.stops.append(self.steps())

    def steps(self) -> int:
        """Return the number of optimiser steps in metrics.jsonl."""
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b'"loss":') if file.exists() else 0

    def _sample(self, ranks: list[psutil.Process]) -> dict[str, Any]:
        rss = [highest_resident(rank.pid) for rank in ranks]
        return {"step": self.steps(), "rss": rss, "cpu": [sum(rank.cpu_times()[:2]) for rank in ranks]}


def highest_resident(pid: int) -> float:
    """Return a process's peak resident MiB since the last sample; 0 if the process has ended.

    Samples of the current resident memory would miss the peaks of short steps more often than those
    of long ones.
    """
    peak = peak_bytes(pid)
    reset_peak_bytes(pid)
    return (peak or 0) / MIB


def small_encoder(layers: int, hidden: int, folder: Path) -> Path:
    """Save a BERT with random weights and MiniLM's tokenizer in `folder`, and return the folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from fastmtl.model.encoder.pretrained import encoder_directory

    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 2,
        "intermediate_size": 4 * hidden,
    }
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(encoder_directory("minilm"), **sizes), False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_directory("minilm")).save_pretrained(folder)
    return folder


def make(part: Path, command: list[str], stops: list[int | None]) -> dict[str, Any]:
    """Run a part, once up to each of `stops` (None: to its end), or read its saved result."""
    import torch

    from fastmtl.measure.environment import environment

    kept = part.with_suffix(".json")
    if not kept.exists():
        origin, begun = environment(torch.device("cpu")), time.time()
        watched = Watched([*command, "--output", str(part)], part)
        for stop in stops:
            watched.go(stop)
        malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        known = {"environment": origin, "malloc": malloc, "seconds": round(time.time() - begun), "stops": watched.stops}
        kept.write_text(json.dumps({**known, "samples": watched.samples}))
    return json.loads(kept.read_text())


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the results as rows of a Markdown table."""
    loss, mem, fast, resume = found["losses"], found["memory"], found["speed"], found["resumed"]

    def row(values: list[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    rows = {
        "steps, all losses finite": f"{loss['steps']:,}",
        "sum of losses, first and last 50 steps": f"{loss['first']:.3f}, {loss['last']:.3f}",
        "MiB of each rank after step 50": row(mem["at_50"], 0),
        "highest 50 steps later": row(mem["most"], 0),
        "highest of one step": row(mem["peak"], 0),
        "MiB per 1,000 steps": row(mem["per_1000_steps"], 1),
        "tokens/s by quarter": row(fast["tokens_per_second"], 0),
        "tokens/s, 10 % and 90 % of the steps": row(fast["from_10_to_90_percent"], 0),
        "CPU seconds of a step and rank by quarter": row(fast["cpu_seconds"], 2),
        "stopped at": row(resume["stopped_at"], 0),
        "steps equal bit for bit": f"{resume['equal_steps']:,} of {resume['steps']:,}",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the files of recipe cs224n; default: recipe demo")
    parser.add_argument("--output", type=Path, required=True, help="folder of both runs")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=4, help="rows per task, process and step, on average")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--small", type=int, nargs=2, metavar=("LAYERS", "HIDDEN"), help="a random BERT, not MiniLM")
    parser.add_argument("--stop-at", type=int, default=60, help="step of the SIGTERM")
    parser.add_argument("--json", type=Path, help="save the result in this file")
    options = parser.parse_args()
    if options.steps < 4 * WINDOW or not 0 < options.stop_at < options.steps:
        parser.error(f"--steps must be {4 * WINDOW} or more, and --stop-at less than --steps")
    options.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(options.processes)]
    command += ["--master_port", free_port(), "--no_python", "fastmtl", "train"]
    command += ["demo"] if options.data is None else ["cs224n", f"data.dir={options.data}"]
    settings = [
        "gradient.method=pcgrad",
        "gradient.storage=stacked",
        f"engine.precision={options.precision}",
        "encoder.max_length=64",
    ]
    settings += [f"sampler.batch_size={options.rows}", f"train.max_steps={options.steps}", "train.epochs=100"]
    more = [f"encoder.path={small_encoder(*options.small, folder=options.output / 'encoder')}"] if options.small else []
    straight, stopped = options.output / "straight", options.output / "stopped"
    end = min(2 * options.stop_at, options.steps)
    whole = make(straight, [*command, *settings, *more], [None])
    interrupted = make(stopped, [*command, *settings, *more], [options.stop_at, end if end < options.steps else None])

    lines, samples = step_lines(straight), whole.pop("samples")
    interrupted.pop("samples")
    judged = {
        "losses": losses(lines, options.steps),
        "memory": memory(samples, options.steps),
        "speed": speed(lines, samples, options.steps),
        "resumed": resumed(lines, step_lines(stopped), interrupted["stops"], end),
    }
    found = {name: numbers for name, (numbers, _) in judged.items()}
    complaints = [text for _, more in judged.values() for text in more]
    print(table(found))
    if options.json is not None:
        result = {"benchmark": "long_run", "settings": settings, "small": options.small, "straight": whole}
        result |= {"stopped": interrupted, **found, "complaints": complaints}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
