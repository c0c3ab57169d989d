"""Accounting of tensor memory: when each storage is made and freed, and what it is used for.

A TorchDispatchMode sees the result of every operation. A weak reference to the result's storage
reports when the storage is freed. torch's own MemTracker (torch.distributed._tools) works the same
way, but does not know J, the matrix of task gradients, nor which tensors of a forward pass outlive
it. Memory that kernels allocate and free inside one operation is not seen.

A storage is assigned to a part as follows. Weights, optimiser state, gradients and J are named by
the objects that hold them. A storage that is made in a forward pass and outlives it is an
activation. A storage that is made by the optimiser, or when gradients are handed to the engine, is
a gradient. Everything else is workspace.
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

    made, freed: numbers of the events (a count that grows with each allocation or free); freed is
    None while alive. range: the outermost range (measure/ranges.py) that made it, None outside one.
    section: number of the forward pass that made it, None outside one. operation: the operator that
    made it. shape: of the tensor that it was made for. part: its use, if an object that holds it
    has named it.
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
    """The moment with the most live bytes.

    parts: live bytes by part. range: the outermost range at that moment, None outside one. alive:
    the live storages with their parts, largest first.
    """

    parts: Bytes
    range: Name | None
    alive: list[tuple[Part, Storage]]

    @property
    def nbytes(self) -> int:
        return total(self.parts)


class Accounting(TorchDispatchMode):
    """A context that records every storage that is made or freed on one device.

    Pass `on_range` to fastmtl.measure.ranges.listening, so that the ranges of storages are known.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self._tick = 0
        self._ranges: list[Name] = []
        self._sections: list[int] = []  # numbers of the forward passes that are running
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
        """Record that a range of fastmtl.measure.ranges begins or ends."""
        if begins:
            self._ranges.append(name)
        else:
            self._ranges.pop()
        if name == "forward":
            self._forward(begins)

    def watch_recomputation(self, modules: Iterable[nn.Module]) -> None:
        """Count the tensors that backward recomputes (`recompute: full`) as activations.

        modules: those whose forward runs again in backward.
        """
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self._forward(True))
            module.register_forward_hook(lambda *_: self._forward(False), always_call=True)

    def name(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Assign the storages of these tensors to a part, no matter which operations made them."""
        for tensor in tensors:
            storage = self._see(tensor, None)
            if storage is not None:
                storage.part = part

    def name_shape(self, shape: tuple[int, ...], part: Part) -> None:
        """Assign the storages made for tensors of this shape to a part, if they have none yet."""
        for storage in self._storages:
            if storage.shape == shape and storage.part is None:
                storage.part = part

    def reset_peak(self) -> None:
        """Forget the storages freed so far, so that `peak` covers only the time from now on."""
        self._storages = [storage for storage in self._storages if storage.freed is None]

    def peak(self, within: Name | None = None) -> Peak:
        """Return the moment with the most live bytes since reset_peak.

        within: search only the time in outermost ranges of this name; None: all of the time.
        """
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
        """Return the bytes that belong to a part and are alive now."""
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
            return "gradients"  # the merged gradient, which is handed to the engine
        return "workspace"
