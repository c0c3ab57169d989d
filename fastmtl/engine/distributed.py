"""The processes of a run, started by the DeepSpeed launcher or torchrun, or a single process."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from fastmtl.engine import extension_locks
from fastmtl.errors import UserError
from fastmtl.system import ports
from fastmtl.system.launcher_variables import number, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and communication with the other ranks.

    rank: from 0 to world - 1, over all machines. world: number of processes. local_rank: number of
    this process on its machine, from 0. device: its GPU, or the CPU.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values (any picklable objects) of all ranks, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1, device=self.device))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a CPU tensor with rank 0's values, in place. Every rank calls this method."""
        shared = tensor.to(self.device)
        dist.broadcast(shared, 0)
        tensor.copy_(shared)

    def any(self, flag: bool) -> bool:
        """Return, on all ranks, True if the flag is set on at least one rank.

        With several ranks the host waits for the device.
        """
        if self.world == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def in_turn(self, work: Callable[[], T]) -> T:
        """Call `work` on the first process of each machine, then on the others; return its result.

        So the other processes can use a file that the first one has written, for example in a
        cache. An error on any rank ends all ranks.
        """
        result: list[T] = []
        failure: Exception | None = None
        for first in (True, False):
            if (self.local_rank == 0) == first and failure is None:
                try:
                    result.append(work())
                except Exception as error:  # raised again by `agree`
                    failure = error
            self.agree(failure)
        return result[0]

    def agree(self, failure: Exception | None = None) -> None:
        """End all ranks if one has failed. Every rank calls this method.

        failure: the error of this rank, None if it has none. If ranks have a UserError, all ranks
        raise that of the lowest one, so that rank 0 can print it. Otherwise each rank raises its
        own error, and a rank without an error exits with status 1.
        """
        if self.world == 1:
            failures: list[tuple[bool, tuple[str, ...]] | None] = []
        else:
            mine = None if failure is None else (isinstance(failure, UserError), getattr(failure, "lines", ()))
            failures = [found for found in self.all_gather(mine) if found is not None]
        for is_user_error, lines in filter(None, failures):
            if is_user_error:
                raise UserError(*lines)
        if failure is not None:
            raise failure
        if failures:
            raise SystemExit(1)


def this_process(local_rank: int | None = None, *, debug: bool = False) -> Ranks:
    """Return this process's ranks and device, without communication.

    local_rank: the argument --local_rank of the DeepSpeed launcher. debug: keep log messages and
    warnings of the libraries. RANK, WORLD_SIZE and LOCAL_RANK come from the launcher; without them
    the run has one process. Raises UserError if they are not numbers or contradict each other.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    if not debug:
        _quiet()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    rank, world, local = number("RANK"), world_size(), number("LOCAL_RANK", local_rank or 0)
    if rank >= world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world}: ranks count from 0 to WORLD_SIZE - 1")
    if gpu and local >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local}, and this machine shows {torch.cuda.device_count()} GPUs: start fewer processes on "
            "it, or let CUDA_VISIBLE_DEVICES name more"
        )
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_world = max(1, number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", world)))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    return Ranks(rank, world, local, device)


def join(ranks: Ranks, *, debug: bool = False, patience: timedelta | None = None) -> None:
    """Import DeepSpeed and connect this process to the other processes of the run.

    patience: the longest time to wait for the others; default: DeepSpeed's. debug: print
    DeepSpeed's messages. Raises UserError if the others cannot be reached.
    """
    extension_locks.release()
    deepspeed = import_deepspeed()
    # DeepSpeed compiles this operator at its first start on a CPU. The operator writes 66 MiB per
    # process to /dev/shm, which stay there. Only DeepSpeed's sharded inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        waiting = {} if patience is None else {"timeout": patience}
        place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        try:
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=debug, **waiting)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"the processes of the run cannot meet at {place}: {str(error).strip().splitlines()[0].rstrip('.')}. "
                "Both variables name one host and a free port of it, alike for every process"
            ) from error
        atexit.register(leave)


def import_deepspeed() -> Any:
    """Import and return the module `deepspeed`.

    Raises UserError if DeepSpeed rejects this machine or the value of DS_ACCELERATOR.
    """
    try:
        import deepspeed
    except (ValueError, AssertionError) as error:
        chosen = os.environ.get("DS_ACCELERATOR")
        raise UserError(f"DeepSpeed cannot start here (DS_ACCELERATOR={chosen}): {error}") from error
    return deepspeed


def leave() -> None:
    """End gloo's threads before the interpreter shuts down.

    A thread of gloo frees a finished collective's tensors some time after the collective. During
    Python's shutdown this makes torch abort the process. Without this function, one in six
    processes that end right after an `all_gather` of two ranks aborted.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def start(local_rank: int | None = None, *, debug: bool = False) -> Ranks:
    """Connect this process to the others (see `join`); return its ranks."""
    ranks = this_process(local_rank, debug=debug)
    join(ranks, debug=debug)
    return ranks


def _quiet() -> None:
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers)\b")


def free_port() -> str:
    """Return a free port as a launcher's argument (`fastmtl.system.ports`)."""
    return str(ports.free_port())


class StopFlag:
    """A flag that asks the training loop to stop; the loop reads `requested` before each step.

    SIGTERM to this process sets the flag, and so does the end of the `deepspeed` command that
    started it: a SIGTERM ends that command, which does not forward the signal to its processes.
    """

    def __init__(self) -> None:
        self._raised = False
        self._command = _deepspeed_command()
        self._previous = signal.signal(signal.SIGTERM, self._raise)

    @property
    def requested(self) -> bool:
        return self._raised or (self._command is not None and not _alive(self._command))

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def release(self) -> None:
        """Restore the previous handler of SIGTERM."""
        signal.signal(signal.SIGTERM, self._previous)


def _deepspeed_command() -> psutil.Process | None:
    """Return the process of the `deepspeed` command, None if it did not start this process.

    It is the parent of DeepSpeed's launcher on this machine, whose child this process is.
    """
    launcher = psutil.Process().parent()
    return launcher.parent() if launcher is not None and "deepspeed.launcher.launch" in launcher.cmdline() else None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
