"""Live bytes of tensors by storage: when each storage is alive, and what it is used for.

A TorchDispatchMode sees the result of every operation. A weak reference to the result's storage
reports when the storage is freed. torch's own MemTracker (torch.distributed._tools) works the same
way, but does not know J, nor which tensors of a forward outlive it. Memory that kernels allocate
and free inside one operation is not seen.

A storage is assigned to a part as follows. Weights, optimiser state, gradients and J are named by
the objects that hold them. A storage made in a forward that outlives the forward is an activation.
A storage made by the hand-over of gradients or by the optimiser is a gradient. Everything else is
workspace.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastmtl.measure.parts import Bytes, Part, total, zero_bytes
from fastmtl.measure.ranges import Name


@dataclass
class Storage:
    """The lifetime of one storage.

    made, freed: ticks; freed is None while the storage is alive. range: the outermost range it was
    made in. section: the number of the forward it was made in. operation: the operation that made
    it.
    """

    nbytes: int
    made: int
    range: Name | None
    section: int | None
    operation: Any
    shape: tuple[int, ...]
    freed: int | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Peak:
    """The largest sum of live bytes: its parts, its range, and the live storages, largest first."""

    parts: Bytes
    range: Name | None
    alive: list[tuple[Part, Storage]]

    @property
    def nbytes(self) -> int:
        return total(self.parts)


class Accounting(TorchDispatchMode):
    """Record the storages on one device while this context is entered.

    `on_range` is its listener for fastmtl.measure.ranges.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self._tick = 0
        self._ranges: list[Name] = []
        self._sections: list[int] = []  # the forwards that are running, by number
        self._section_ends: list[int | None] = []
        self._storages: list[Storage] = []
        self._alive: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._range_at: dict[int, Name | None] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, function)
        return result

    def on_range(self, name: Name, begins: bool) -> None:
        """Handle a range event of fastmtl.measure.ranges."""
        if begins:
            self._ranges.append(name)
        else:
            self._ranges.pop()
        if name == "forward":
            self._forward(begins)

    def watch_recomputation(self, modules: Iterable[nn.Module]) -> None:
        """Count the tensors that `recompute: full` makes in backward as activations, too.

        modules: those that backward runs forward again.
        """
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self._forward(True))
            module.register_forward_hook(lambda *_: self._forward(False), always_call=True)

    def name(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Assign the storages of these tensors to a part, whatever made them."""
        for tensor in tensors:
            storage = self._see(tensor, None)
            if storage is not None:
                storage.part = part

    def name_shape(self, shape: tuple[int, ...], part: Part) -> None:
        """Assign all unnamed storages that were made for a tensor of this shape to a part."""
        for storage in self._storages:
            if storage.shape == shape and storage.part is None:
                storage.part = part

    def reset_peak(self) -> None:
        """Make `peak` cover only the time from now on."""
        self._storages = [storage for storage in self._storages if storage.freed is None]

    def peak(self, within: Name | None = None) -> Peak:
        """Return the peak of the whole time, or of the outermost ranges of this name."""
        changes: list[tuple[int, int]] = []
        for storage in self._storages:
            changes.append((storage.made, storage.nbytes))
            if storage.freed is not None:
                changes.append((storage.freed, -storage.nbytes))
        live, most, at = 0, 0, 0
        for tick, change in sorted(changes):
            live += change
            if live > most and within in (None, self._range_at[tick]):
                most, at = live, tick
        parts, alive = zero_bytes(), []
        for storage in self._storages:
            if storage.made <= at and (storage.freed is None or storage.freed > at):
                part = self._part(storage)
                parts[part] += storage.nbytes
                alive.append((part, storage))
        alive.sort(key=lambda entry: -entry[1].nbytes)
        return Peak(parts, self._range_at.get(at), alive)

    def live_bytes(self) -> int:
        return sum(storage.nbytes for _, storage in self._alive.values())

    def alive(self, part: Part) -> int:
        """Return the bytes of a part that are alive now."""
        storages = (storage for storage in self._storages if storage.freed is None)
        return sum(storage.nbytes for storage in storages if self._part(storage) == part)

    def _see(self, tensor: Tensor, operation: Any) -> Storage | None:
        if tensor.device.type != self._device or tensor.layout != torch.strided:
            return None
        held = tensor.untyped_storage()
        key = held._cdata
        known = self._alive.get(key)
        if known is not None and known[0]() is not None:
            storage = known[1]
            if storage.nbytes != held.nbytes():  # resized in place
                storage.nbytes = max(storage.nbytes, held.nbytes())
            return storage
        if held.nbytes() == 0:
            return None
        storage = Storage(
            held.nbytes(),
            self._next_tick(),
            self._ranges[0] if self._ranges else None,
            self._sections[-1] if self._sections else None,
            operation,
            tuple(tensor.shape),
        )
        self._storages.append(storage)
        self._alive[key] = weakref.ref(held, partial(self._free, key, storage)), storage
        return storage

    def _free(self, key: int, storage: Storage, _: Any) -> None:
        storage.freed = self._next_tick()
        if key in self._alive and self._alive[key][1] is storage:
            del self._alive[key]

    def _next_tick(self) -> int:
        self._tick += 1
        self._range_at[self._tick] = self._ranges[0] if self._ranges else None
        return self._tick

    def _forward(self, begins: bool) -> None:
        if begins:
            self._sections.append(len(self._section_ends) if not self._sections else self._sections[-1])
            if len(self._sections) == 1:
                self._section_ends.append(None)
        elif self._sections:
            section = self._sections.pop()
            if not self._sections:
                self._section_ends[section] = self._tick

    def _part(self, storage: Storage) -> Part:
        if storage.part is not None:
            return storage.part
        if storage.section is not None:
            end = self._section_ends[storage.section]
            outlives = end is not None and (storage.freed is None or storage.freed > end)
            return "activations" if outlives else "workspace"
        if storage.range in ("communication", "optimiser"):
            return "gradients"
        if storage.range == "surgery" and storage.freed is not None and self._range_at[storage.freed] != "surgery":
            return "gradients"  # the merged gradient, which is handed over
        return "workspace"
