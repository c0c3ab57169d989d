"""Arguments and outputs of modules as trees of tensors, cut into tasks and joined again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


class Unsupported(ValueError):
    """A value that cannot be cut into rows or joined; the text completes "module X has ..."."""


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree of tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for _, value in _items(tree):
        yield from tensors_in(value)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the tree with function(tensor) in place of each tensor; other leaves stay as they are.

    Raises Unsupported for an object of another kind that holds tensors, such as a cache of keys.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    items = _items(tree)
    if not items:
        check_leaf(tree)
        return tree
    return _rebuilt(tree, [map_tensors(function, value) for _, value in items])


def join_trees(join: Callable[[Sequence[Tensor]], Tensor], trees: Sequence[Any]) -> Any:
    """Return one tree of T trees of one structure, with join(T tensors) in place of the tensors.

    Raises Unsupported for trees of different structure.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        if not all(isinstance(tree, Tensor) for tree in trees):
            raise Unsupported("outputs of different kinds in different tasks")
        return join(trees)
    items = [_items(tree) for tree in trees]
    if any(type(tree) is not type(first) for tree in trees) or any(
        [key for key, _ in found] != [key for key, _ in items[0]] for found in items
    ):
        raise Unsupported("outputs of different structure in different tasks")
    if not items[0]:
        check_leaf(first)
        return first
    values = zip(*([value for _, value in found] for found in items), strict=True)
    return _rebuilt(first, [join_trees(join, list(of_tasks)) for of_tasks in values])


def check_leaf(value: Any) -> None:
    """Raise Unsupported for an object that holds tensors out of reach, such as a cache of keys."""
    inside = list(getattr(value, "__dict__", {}).values())
    inside += [item for held in inside if isinstance(held, list | tuple) for item in held]
    if "Cache" in type(value).__name__ or any(isinstance(item, Tensor) for item in inside):
        raise Unsupported(
            f"an argument or output of type {type(value).__name__}, which holds rows of all tasks (for a cache of keys "
            "and values use use_cache=False)"
        )


def _items(tree: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values of an inner node; nothing for a leaf."""
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple | list):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return []


def _rebuilt(tree: Any, values: list[Any]) -> Any:
    kind: Any = type(tree)
    if dataclasses.is_dataclass(tree):  # transformers' ModelOutput is a mapping, too, without the empty fields
        return kind(**dict(zip([key for key, _ in _items(tree)], values, strict=True)))
    if isinstance(tree, Mapping):
        return kind(zip(tree, values, strict=True))
    return kind(*values) if hasattr(tree, "_fields") else kind(values)
