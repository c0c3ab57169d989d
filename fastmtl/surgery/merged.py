"""The gradients that one step hands over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor


class Merged(MutableMapping[int, Tensor]):
    """Gradients by the parameter's id. Most are parts of one flat tensor, and the view of a part is made when it is
    asked for: a call of an operator for each of hundreds of parameters.

    flat: contiguous, the first of its storage. like: by id, the tensor of whose shape, strides and offset the view is.
    """

    def __init__(self, flat: Tensor | None = None, like: Mapping[int, Tensor] | None = None) -> None:
        self._flat, self._like = flat, dict(like or {})
        self._others: dict[int, Tensor] = {}

    def take_joined(self, keys: Sequence[int]) -> Tensor:
        """Take out those of `keys`, flat and one after the other: a view where they lie so, else a copy."""
        places = [self._like[key] for key in keys if key in self._like]
        ends = [place.storage_offset() + place.numel() for place in places]
        beside = all(place.storage_offset() == end for place, end in zip(places[1:], ends, strict=False))
        if self._flat is None or len(places) < len(keys) or not beside:
            found = [self.pop(key).flatten() for key in keys]
            return torch.cat(found) if len(found) > 1 else found[0]
        for key in keys:
            del self._like[key]
        begin = places[0].storage_offset()
        return self._flat.as_strided((ends[-1] - begin,), (1,), begin)

    def multiply(self, factor: float) -> None:
        """Multiply all of them in place."""
        torch._foreach_mul_([*self._others.values(), *([] if self._flat is None else [self._flat])], factor)

    def __getitem__(self, key: int) -> Tensor:
        if key in self._others:
            return self._others[key]
        like = self._like[key]
        assert self._flat is not None
        return self._flat.as_strided(like.shape, like.stride(), like.storage_offset())  # one call: split and view are 3

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


def unshared(gradients: list[Tensor]) -> list[Tensor]:
    """Gradients that can be changed in place: autograd gives one tensor for two parameters, or one number for all of a
    tensor's.
    """
    found, places = [], set()
    for gradient in gradients:
        alone = gradient.data_ptr() not in places and gradient.is_contiguous()
        places.add(gradient.data_ptr())
        found.append(gradient if alone else gradient.clone(memory_format=torch.contiguous_format))
    return found
