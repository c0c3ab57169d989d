"""Copies from the host to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, itself where it is there already.

    A copy to a GPU reads pinned memory, so the host goes on at once. From pageable memory it would wait until the
    driver has staged the bytes, behind everything that the GPU still has to do.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def upload_into(buffer: Tensor, tensor: Tensor) -> None:
    """Copies a tensor of the CPU into a buffer of its shape on any device; the host goes on as with `upload`."""
    buffer.copy_(tensor.pin_memory() if buffer.is_cuda else tensor, non_blocking=True)
