"""Messages if NVIDIA's library is missing or denied, or gives only some numbers."""

from __future__ import annotations

import builtins
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmtl.profile.nvml import Nvml

DEVICE = torch.device("cuda", 0)


class Denied(Exception):
    pass


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))


def library(**functions: Any) -> SimpleNamespace:
    used = SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 << 30)
    stranger = SimpleNamespace(pid=1, usedGpuMemory=1)
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [stranger, used],
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=93),
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_500,
    }
    return SimpleNamespace(**{**answers, **functions})


def denied(*_: Any) -> None:
    raise Denied("Insufficient Permissions")


def test_numbers_of_this_process_on_this_gpu() -> None:
    nvml = Nvml(DEVICE, library())
    assert nvml._handle == "GPU-1234"
    assert (nvml.process_bytes(), nvml.utilisation(), nvml.joules()) == (5 << 30, 93, 12.5)
    assert nvml.notes() == []


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "pynvml":
            raise ImportError("No module named 'pynvml'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    nvml = Nvml(DEVICE)
    assert (nvml.process_bytes(), nvml.utilisation(), nvml.joules()) == (None, None, None)
    assert nvml.notes() == ["nvidia-ml-py is not installed: pip install 'fastmtl-torch[gpu]'"]


def test_denied_from_the_start() -> None:
    nvml = Nvml(DEVICE, library(nvmlInit=denied))
    assert nvml.joules() is None
    assert nvml.notes() == ["NVML: Insufficient Permissions"]


def test_one_number_denied() -> None:
    nvml = Nvml(DEVICE, library(nvmlDeviceGetTotalEnergyConsumption=denied))
    found: list[int] = []
    with nvml.watching(found, every=0.001):
        while not found:
            pass
    assert set(found) == {93}
    assert nvml.joules() is None and nvml.process_bytes() == 5 << 30
    assert nvml.notes() == ["NVML: energy: Insufficient Permissions"]


def test_a_container_may_hide_the_process() -> None:
    nvml = Nvml(DEVICE, library(nvmlDeviceGetComputeRunningProcesses=lambda handle: []))
    assert nvml.process_bytes() is None
