"""Ranks forked from a process that has imported everything: under a launcher each takes seconds to start."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from fastmtl.engine.distributed import free_port


def run_ranks(world: int, function: Callable[..., object], *arguments: Any) -> None:
    """Run function(*arguments) in `world` processes with a launcher's environment variables.

    End this process where one of them fails. It must not have started threads, so not trained yet.
    """
    # What each rank would import otherwise: DeepSpeed, and torch's compiler with its first engine.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=_run, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for sentinel in wait(list(running)):
            rank = running.pop(sentinel)  # type: ignore[call-overload]
            rank.join()
            if rank.exitcode:
                for other in running.values():
                    other.kill()
                sys.exit(f"a rank of {world} ended with status {rank.exitcode}")


def _run(rank: int, world: int, port: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **place)
    function(*arguments)
