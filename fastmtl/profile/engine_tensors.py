"""The tensors that a DeepSpeed engine's optimiser holds, by use.

The names of the attributes are those of DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def optimiser_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield float32 master weights and moments; without masters, the weights in their place."""
    base = getattr(optimizer, "optimizer", optimizer)
    for group in base.param_groups:
        yield from (parameter.data for parameter in group["params"])
    for state in base.state.values():
        yield from _tensors(state.values())
    yield from _tensors(getattr(optimizer, "fp32_partitioned_groups_flat", ()))


def partitioned_weights(model: nn.Module, optimizer: Any) -> Iterator[Tensor]:
    """Yield this rank's weights under ZeRO 3, and the offload's buffers of updated weights."""
    yield from _tensors(getattr(parameter, "ds_tensor", None) for parameter in model.parameters())
    yield from _tensors([getattr(optimizer, "lp_param_buffer", None)])
    yield from _tensors(getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", ()))


def gradient_buffers(optimizer: Any) -> Iterator[Tensor]:
    """Yield the gradient buffers that ZeRO 3 and offload keep between steps."""
    yield from _tensors([getattr(optimizer, "grad_partitions_flat_buffer", None)])
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buffer = bucket.buffer
        yield from _tensors([buffer] if isinstance(buffer, Tensor) else buffer)
    for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
        yield from _tensors([getattr(optimizer, name, None)])
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from _tensors(master.grad for master in getattr(optimizer, name, ()))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
