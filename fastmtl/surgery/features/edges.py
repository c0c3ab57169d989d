"""Features as edges of the autograd graph, between the trunk and the operations that read them.

DeepSpeed and DistributedDataParallel return wrapped outputs: heads inside the wrapped module read
the tensor beneath. So a feature is the first of a chain of edges on which a loss depends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fastmtl.errors import UserError, listed
from fastmtl.surgery.rules.trees import tensors_in

# Autograd functions that return their inputs, by the number of their inputs before the outputs.
_WRAPPERS = {"PreBackwardFunctionForModuleBackward": 0, "_DDPSinkBackward": 1}

_ADVICE = "give the trunk's output that the heads read, as the forward returned it"


def chains_of(features: Any) -> list[list[GradientEdge]]:
    """Return each feature's edges, from the tensor itself to the one beneath all wrappers.

    features: a tensor, or a tuple, list, mapping or dataclass with tensors.
    Raises UserError for a tensor that depends on no trained parameter.
    """
    tensors = list(tensors_in(features))
    if not tensors:
        raise UserError(f"features are of type {type(features).__name__} and hold no tensor: {_ADVICE}")
    return [list(_chain(tensor)) for tensor in tensors]


def _chain(tensor: Tensor) -> Iterator[GradientEdge]:
    if tensor.grad_fn is None:
        raise UserError(
            f"features: a tensor of shape {tuple(tensor.shape)} depends on no trained parameter: look for detach() or "
            f"torch.no_grad(), and {_ADVICE}"
        )
    node, number = tensor.grad_fn, tensor.output_nr
    yield GradientEdge(node, number)
    while node.name() in _WRAPPERS:
        beneath, number = node.next_functions[number + _WRAPPERS[node.name()]]
        if beneath is None:
            return
        node = beneath
        yield GradientEdge(node, number)


def check_independent(edges: Sequence[GradientEdge]) -> None:
    """Raise UserError for features that would count twice: equal, or computed from another."""
    if len(set(edges)) < len(edges):
        raise UserError("features: one of the tensors is given twice: give each of them once")
    others = {edge.node for edge in edges}
    for edge in edges:
        below = [node for node, _ in edge.node.next_functions if node is not None]
        if any(node in others for node in _nodes(below)):
            raise UserError("features: one of the tensors is computed from another: give only one of them")


def readers_of(losses: Mapping[str, Tensor], edges: Sequence[GradientEdge]) -> dict[Node, dict[int, tuple[str, int]]]:
    """Return the nodes that read the features, for each the (task, feature) of its inputs.

    losses: of each task.
    Raises UserError for a node of several tasks: its gradient is the sum of theirs.
    """
    numbers = {(edge.node, edge.output_nr): k for k, edge in enumerate(edges)}
    ends = {edge.node for edge in edges}
    found: dict[Node, dict[int, tuple[str, int]]] = {}
    for task, loss in losses.items():
        for node in _nodes([loss.grad_fn] if loss.grad_fn is not None else [], ends):
            for k, edge in enumerate(node.next_functions if node not in ends else ()):
                if edge not in numbers:
                    continue
                inputs = found.setdefault(node, {})
                if k in inputs:
                    raise UserError(
                        f"features: an operation ({node.name()}) reads them for tasks {listed([inputs[k][0], task])}, "
                        "and ZeRO 3 allows one backward pass only: give in its place its result, the tensor that each "
                        "head reads itself, or use ZeRO 0 to 2"
                    )
                inputs[k] = task, numbers[edge]
    return found


def first_read(losses: Mapping[str, Tensor], chains: Sequence[Sequence[GradientEdge]]) -> list[GradientEdge | None]:
    """Return the first edge of each chain on which a loss depends."""
    ends = {edge.node for chain in chains for edge in chain[:1]} | {chain[-1].node for chain in chains}
    roots = [loss.grad_fn for loss in losses.values() if loss.grad_fn is not None]
    read = {edge for node in _nodes(roots, ends) if node not in ends for edge in node.next_functions}
    return [next((edge for edge in chain if (edge.node, edge.output_nr) in read), None) for chain in chains]


def _nodes(roots: Sequence[Node], ends: set[Node] | None = None) -> Iterator[Node]:
    """Yield the nodes that gradients pass from `roots` on, not beyond `ends`."""
    seen, waiting = set[Node](), list(roots)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not ends or node not in ends:
            waiting += [following for following, _ in node.next_functions if following is not None]
