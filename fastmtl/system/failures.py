"""Messages for exceptions that come from the input or the state of the machine, not from a bug.

torch, DeepSpeed and NCCL raise plain RuntimeErrors for most of them, so the texts of the exceptions
are matched. Imports no heavy module.
"""

from __future__ import annotations

import os
import re

from fastmtl.errors import TrainingError, one_line

_GPU_MEMORY = re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_HOST_MEMORY = re.compile(r"can't allocate memory|[Cc]annot allocate memory|std::bad_alloc|[Uu]nable to mmap")
# A GPU that is lost, busy or too old. An illegal address or a failed assertion in a kernel is a
# bug.
_GPU = re.compile(
    r"no CUDA-capable device|No CUDA GPUs|CUDA driver|busy or unavailable|ECC error|no kernel image"
    r"|invalid device ordinal|system not yet initialized|no NVIDIA driver"
)
_DISTRIBUTED = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
_PEERS = re.compile(r"by peer|gloo|NCCL|[Tt]imed out|rendezvous|Broken pipe|Socket")
_DISK = re.compile(r"PytorchStreamWriter|inline_container|file write failed|\(os error \d+\)|No space left on device")


def explained(error: BaseException) -> str | None:
    """Return a line that explains an exception and gives advice; None for a bug.

    An exception is explained if the input or the machine has caused it.
    """
    text = one_line(str(error) or type(error).__name__)
    name, number = type(error).__name__, f" ({text})" if str(error) else ""
    if isinstance(error, TrainingError):
        return text
    if name == "OutOfMemoryError" or _GPU_MEMORY.search(text):  # torch's, without importing torch
        return (
            "out of GPU memory: lower sampler.batch_size (or batch_tokens) and raise engine.accumulation, or set "
            f"encoder.recompute: cheap or full{number}"
        )
    if isinstance(error, MemoryError) or _HOST_MEMORY.search(text):
        return (
            "out of memory: lower sampler.batch_size (or batch_tokens), or the sizes of the encoder, adapters and "
            f"heads, or run fewer processes on this machine{number}"
        )
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ImportError):
        return f"a package cannot be imported: {text}. `fastmtl doctor` says what is missing"
    if name in _DISTRIBUTED or (isinstance(error, RuntimeError) and _shared_run() and _PEERS.search(text)):
        return f"the other processes of the run cannot be reached; the one that ended first says why ({text})"
    if isinstance(error, RuntimeError) and _GPU.search(text):
        return f"the GPU cannot be used: {text}. `fastmtl doctor` shows what torch sees"
    if _DISK.search(text):
        return f"a file could not be written or read, as on a full disk: {text}"
    return None


def _of_system(error: OSError) -> str:
    given = (error.filename, error.filename2)
    names = [os.fsdecode(name) for name in given if isinstance(name, str | bytes | os.PathLike)]
    reason = error.strerror or str(error) or type(error).__name__
    return one_line(f"{', '.join(names)}: {reason}" if names else reason)


def _shared_run() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"
