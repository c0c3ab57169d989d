"""Buffers and random numbers that a check leaves as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fastmtl.surgery.random_state import RandomState


@contextmanager
def keep_buffers(module: nn.Module) -> Iterator[None]:
    """Let the module use copies of its buffers in the block, whose results are dropped.

    The buffers themselves must not change: a graph before the block may need them for backward.
    """
    before = [(inner._buffers, dict(inner._buffers)) for inner in module.modules() if inner._buffers]
    for buffers, found in before:
        buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in found.items()})
    try:
        yield
    finally:
        for buffers, found in before:
            buffers.update(found)


@contextmanager
def unchanged(device: torch.device, module: nn.Module | None = None) -> Iterator[RandomState]:
    """Restore torch's random state after the block, and the buffers of modules that run inside.

    These are running statistics, for example. Yields the random state at the beginning.

    module: one whose forward is called directly inside, so that no hook shows that it runs.
    """
    state, before = RandomState.capture(device), dict[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]]()

    def save(module: nn.Module, _: object) -> None:
        if module not in before:
            before[module] = {
                name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()
            }

    if module is not None:
        save(module, None)
    hook = register_module_forward_pre_hook(save)
    try:
        yield state
    finally:
        hook.remove()
        for module, buffers in before.items():
            for name, (buffer, copy) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                    buffer.data.copy_(copy)  # autograd does not count this as a change, nor that by BatchNorm
        state.restore()
