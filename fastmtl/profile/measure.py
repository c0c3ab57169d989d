"""Measurement of one point of a profile, in the current process."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.corpus import Corpus
from fastmtl.engine.distributed import start
from fastmtl.errors import UserError
from fastmtl.measure.harness import peak_bytes, summary
from fastmtl.measure.heap import free_at_once
from fastmtl.model.encoder.pretrained import load_tokenizer
from fastmtl.profile.load import Load
from fastmtl.profile.nvml import Nvml
from fastmtl.profile.plan import TIMED, Draw, Point, choose_phase, draw, settings
from fastmtl.profile.steps import Steps
from fastmtl.training.phase_model import PhaseModel

WATCH_SECONDS = 0.005


@dataclass(frozen=True)
class Job:
    """A point to measure.

    recipe: as plain data, for another process. phase: the name of the recipe's phase; None: see
    choose_phase. limit: bytes that the process (on a GPU: torch) may hold. timed: the number of
    timed steps. trace: the file for a trace; None: no trace.
    """

    recipe: dict[str, Any]
    phase: str | None
    point: Point
    limit: int | None = None
    timed: int = TIMED
    trace: str | None = None


def measure(job: Job) -> dict[str, Any]:
    """Run steps of a point; return their memory and times, JSON-ready.

    Raises UserError, and torch's errors if memory runs out. On a CPU, the process kills itself if
    it exceeds the job's limit.
    """
    free_at_once()
    phase = settings(choose_phase(parse_recipe(job.recipe, "recipe"), job.phase), job.point)
    recipe = phase.recipe
    ranks = start()
    _limit(job.limit, ranks.device)
    tokenizer = load_tokenizer(recipe.encoder)
    model = PhaseModel(phase).model
    drawn = draw(recipe, Corpus.load(recipe, tokenizer, model.encoder.max_length))
    steps = Steps(recipe, model, ranks.world, ranks.device)
    steps.counted(drawn.largest)  # allocates J and the optimiser's state
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    peak = steps.counted(drawn.largest).peak()
    loads = list(map(Load.of, drawn.largest))
    found: dict[str, Any] = {
        "tokens": sum(load.tokens for load in loads),
        "sequences": sum(load.sequences for load in loads),
        "parts": peak.parts,
        "bytes": peak.nbytes,
        "phase": peak.range,
    }
    on_gpu = ranks.device.type == "cuda"
    nvml = Nvml(ranks.device) if on_gpu else None
    if nvml is not None:
        found |= _gpu_memory(ranks.device, nvml)
    if job.timed:
        found |= _times(steps, drawn, job.timed, nvml)
    if not on_gpu:
        found["process_bytes"] = peak_bytes()
    if nvml is not None:
        found["notes"] = nvml.notes()
    if job.trace is not None:
        from fastmtl.profile.trace import trace

        found["trace"] = trace(steps, drawn.stream, Path(job.trace), ranks.device, recipe.data.prefetch)
    return found


def _times(steps: Steps, drawn: Draw, number: int, nvml: Nvml | None) -> dict[str, Any]:
    """Return seconds and real tokens per second of the epoch's first steps.

    The steps with tensor accounting ran before and were the warm-up.
    """
    seconds, rates = [], []
    used: list[int] = []
    before = None if nvml is None else nvml.joules()
    with nullcontext() if nvml is None else nvml.watching(used):
        for index in range(number):
            micro_batches = drawn.steps[index % len(drawn.steps)]
            steps.wait()
            begun = time.perf_counter()
            steps.step(micro_batches)
            steps.wait()
            seconds.append(time.perf_counter() - begun)
            rates.append(sum(batch.num_tokens for batch in micro_batches) / seconds[-1])
    found: dict[str, Any] = {"seconds": summary(seconds), "tokens_per_s": statistics.median(rates)}
    after = None if nvml is None else nvml.joules()
    if before is not None and after is not None:
        found["joules_per_step"] = (after - before) / number
    if used:
        found["utilisation"] = statistics.mean(used)
    return found


def _gpu_memory(device: torch.device, nvml: Nvml) -> dict[str, Any]:
    """Return bytes on the GPU: peaks of torch's tensors and pool, of the process, and the total."""
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "process_bytes": nvml.process_bytes(),
        "device_bytes": torch.cuda.get_device_properties(device).total_memory,
    }


def _limit(nbytes: int | None, device: torch.device) -> None:
    if nbytes is None:
        return
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        if nbytes > whole:
            raise UserError(f"--memory-limit is more than the {whole / 2**30:.1f} GiB of this GPU")
        torch.cuda.set_per_process_memory_fraction(nbytes / whole, device)
        return
    threading.Thread(target=_watch, args=(nbytes,), daemon=True).start()


def _watch(limit: int) -> None:
    """Wait until this process holds more than `limit` bytes, then kill it.

    The limit is for the resident set. RLIMIT_AS limits the address space, of which libraries and
    DeepSpeed's buckets reserve much more than they touch.
    """
    process = psutil.Process()
    while process.memory_info().rss <= limit:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def dumped(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")
