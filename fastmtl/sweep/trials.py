"""The running trials of a search: their processes, their environment, their dev scores so far."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.sweep.grid import Point


@dataclass
class Running:
    """A trial that runs.

    number: that of the message, from 1. slot: from 0. reported: the number of evaluations that
    Optuna knows. told: the process has been told to end.
    """

    trial: Any
    number: int
    point: Point
    process: subprocess.Popen[bytes]
    place: Path
    slot: int
    reported: int = 0
    pruned: bool = False
    told: bool = False


@contextmanager
def ended_at_errors(running: list[Running]) -> Iterator[None]:
    """End the processes of all running trials if the block raises an error."""
    try:
        yield
    except BaseException:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
        raise


def environment_of(slot: int, parallel: int) -> dict[str, str]:
    """Return the environment of a trial: with several at a time, one GPU or a part of the cores."""
    environment = dict(os.environ)
    if parallel > 1:
        devices = visible_devices()
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    return environment


def evaluations(place: Path) -> list[float]:
    """Return the mean dev score of each evaluation of a run so far.

    NaN for a mean that is not finite. The last line of metrics.jsonl may be incomplete while the
    run writes it.
    """
    try:
        lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    means = []
    for line in lines:
        if '"dev"' in line:
            try:
                mean = json.loads(line)["mean"]
            except (ValueError, KeyError):
                continue
            means.append(math.nan if mean is None else mean)
    return means


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
