"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`, itself where it is there already.

    A copy to a GPU reads pinned memory, so the host does not wait. From pageable memory it would
    wait until the driver has staged the bytes, after all work that the GPU has queued.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def upload_into(buffer: Tensor, tensor: Tensor) -> None:
    """Copy a CPU tensor into a buffer of its shape on any device.

    The host does not wait, as with `upload`.
    """
    buffer.copy_(tensor.pin_memory() if buffer.is_cuda else tensor, non_blocking=True)
