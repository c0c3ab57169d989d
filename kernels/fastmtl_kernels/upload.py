"""Copies from the host to a device, without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a copy of the tensor on `device`; the tensor itself if it is there already.

    Tensors for a GPU are first copied to pinned memory, so the host does not wait. With pageable
    memory the host would wait until the GPU has finished all queued work and copied the bytes.
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
