"""The gradients that a step hands to the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn


class Merged(MutableMapping[int, Tensor]):
    """Mapping from parameter ids to gradients, most of which are parts of one flat tensor.

    A part becomes a tensor (a view of `flat`) only when it is read, at the cost of an operator
    call. `take_joined` reads many adjacent parts by one call.

    flat: contiguous, and at offset 0 of its storage. like: for each id, a tensor with the shape,
    strides and storage offset of its part of `flat`.
    """

    def __init__(self, flat: Tensor | None = None, like: Mapping[int, Tensor] | None = None) -> None:
        self._flat, self._like = flat, dict(like or {})
        self._others: dict[int, Tensor] = {}

    def take_joined(self, keys: Sequence[int]) -> Tensor:
        """Remove the gradients of `keys` and return them flat, one after the other.

        The result is a view if these gradients are adjacent in `flat`, else a copy.
        """
        parts = [self._like[key] for key in keys if key in self._like]
        ends = [part.storage_offset() + part.numel() for part in parts]
        adjacent = all(part.storage_offset() == end for part, end in zip(parts[1:], ends, strict=False))
        if self._flat is None or len(parts) < len(keys) or not adjacent:
            found = [self.pop(key).flatten() for key in keys]
            return torch.cat(found) if len(found) > 1 else found[0]
        for key in keys:
            del self._like[key]
        begin = parts[0].storage_offset()
        return self._flat.as_strided((ends[-1] - begin,), (1,), begin)

    def multiply(self, factor: float) -> None:
        """Multiply all gradients in place."""
        torch._foreach_mul_([*self._others.values(), *([] if self._flat is None else [self._flat])], factor)

    def __getitem__(self, key: int) -> Tensor:
        if key in self._others:
            return self._others[key]
        like = self._like[key]
        assert self._flat is not None
        return self._flat.as_strided(
            like.shape, like.stride(), like.storage_offset()
        )  # one operator call; split, index and view are three

    def __setitem__(self, key: int, gradient: Tensor) -> None:
        self._like.pop(key, None)
        self._others[key] = gradient

    def __delitem__(self, key: int) -> None:
        if key in self._others:
            del self._others[key]
        else:
            del self._like[key]

    def __iter__(self) -> Iterator[int]:
        yield from [*self._like, *self._others]

    def __len__(self) -> int:
        return len(self._like) + len(self._others)


def by_parameter(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], *, exclusive: bool
) -> tuple[Merged, set[int]]:
    """Return the gradients by parameter id, zeros where one is None, and the ids of the others.

    exclusive: True to copy gradients that share memory, so that all can be changed in place.
    """
    pairs = list(zip(parameters, gradients, strict=True))
    found = [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in pairs]
    merged = Merged()
    merged.update(zip(map(id, parameters), unshared(found) if exclusive else found, strict=True))
    return merged, {id(parameter) for parameter, gradient in pairs if gradient is not None}


def unshared(gradients: list[Tensor]) -> list[Tensor]:
    """Return gradients that can be changed in place: a copy of each one that shares its memory.

    Autograd may return one tensor for two parameters, or one number expanded to a whole tensor.
    """
    result, seen = [], set()
    for gradient in gradients:
        exclusive = gradient.data_ptr() not in seen and gradient.is_contiguous()
        seen.add(gradient.data_ptr())
        result.append(gradient if exclusive else gradient.clone(memory_format=torch.contiguous_format))
    return result
