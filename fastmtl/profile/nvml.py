"""Readings of NVIDIA's driver with nvidia-ml-py: memory of this process, utilisation, energy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Nvml:
    """Readings of one GPU from NVIDIA's driver.

    reason: "" if the driver can be read; else why not, and every reading is None. denied: the
    reason for each single reading that the driver or the GPU does not provide; it is None.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        self.reason = ""
        self.denied: dict[str, str] = {}
        self._nvml, self._handle = None, None
        try:
            self._nvml = _import() if library is None else library
            self._nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except ImportError:
            self.reason = "nvidia-ml-py is not installed: pip install 'fastmtl-torch[gpu]'"
        except Exception as error:  # noqa: BLE001 - NVML's own class, which may not be importable
            self.reason = f"NVML: {error}"

    def process_bytes(self) -> int | None:
        """Return the bytes that this process holds on the GPU, including the CUDA context."""

        def read(nvml: Any, handle: Any) -> int | None:
            used = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
            return used[0] if used else None  # a container may hide process ids

        return self._ask("memory of the process", read)

    def utilisation(self) -> int | None:
        """Return the percentage of the driver's last sample period in which a kernel ran."""
        return self._ask("utilisation", lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    def joules(self) -> float | None:
        """Return the energy in joules that the GPU has used since the driver was loaded."""
        return self._ask("energy", lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)

    @contextmanager
    def watching(self, found: list[int], every: float = 0.05) -> Iterator[None]:
        """Sample the utilisation into `found` while the block runs."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(every):
                value = self.utilisation()
                if value is None:
                    return
                found.append(value)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _ask(self, what: str, read: Callable[[Any, Any], Any]) -> Any:
        if self.reason or what in self.denied:
            return None
        try:
            return read(self._nvml, self._handle)
        except Exception as error:  # noqa: BLE001 - as above
            self.denied[what] = f"NVML: {what}: {error}"
            return None

    def notes(self) -> list[str]:
        """Return the reasons of missing readings, as sentences."""
        return [self.reason] if self.reason else list(self.denied.values())


def _import() -> Any:
    import pynvml

    return pynvml
