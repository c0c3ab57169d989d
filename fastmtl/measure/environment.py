"""The environment of a measurement: machine, versions, and all else that changes its result."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from fastmtl.measure.checkout import checkout, output_of
from fastmtl.version import __version__
from fastmtl_kernels import implementations

_PACKAGES = ("transformers", "triton", "torchjd", "peft", "liger-kernel")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return device, driver, versions, kernels and commit, JSON-ready.

    kernels: the implementation that `impl="auto"` selects, by operation. commit: the output of `git
    describe --always --dirty` for a copy of a checkout without its .git. It is ignored in a
    checkout, which has its own. clean: see checkout().
    """
    found = {
        "device": _device(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "fastmtl": __version__,
        "kernels": {
            operation: next(entry.impl for entry in entries if entry.auto)
            for operation, entries in implementations(device).items()
        },
    }
    return {**found, **checkout(commit)}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    found = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
