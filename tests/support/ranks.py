"""Ranks that are forked from a process with all imports.

Under a launcher each rank takes seconds to import them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from fastmtl.engine.distributed import free_port


def run_ranks(world: int, function: Callable[..., object], *arguments: Any, deepspeed: bool = True) -> None:
    """Run function(*arguments) in `world` processes with a launcher's environment variables.

    If one of them fails, the others are killed and this process ends. Call this before this process
    trains: threads do not survive a fork.

    deepspeed: False if no rank makes an engine.
    """
    if deepspeed:  # else each rank would import it at its start, and torch's compiler with its first engine
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=_run, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    running = list(ranks)
    while running:
        wait([rank.sentinel for rank in running])
        running = [rank for rank in running if rank.exitcode is None]
        for status in {rank.exitcode for rank in ranks} - {None, 0}:
            for rank in running:
                rank.kill()
            sys.exit(f"one of {world} ranks ended with status {status}")


def _run(rank: int, world: int, port: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **place)
    function(*arguments)
