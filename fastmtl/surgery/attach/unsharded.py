"""The whole parameters that fully_shard (FSDP2) gives modules for their forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.jacobian.tables import is_sharded
from fastmtl.surgery.rules.aliases import Owned
from fastmtl.surgery.rules.trees import Unsupported, map_tensors, tensors_in


class Unsharded:
    """Record of the tensors that stand for sharded parameters in autograd's graph.

    An FSDPModule has the tensors of all its parameters, but of nested FSDPModules, for the time of
    its forward. An optimizer knows the shards, of which the graph knows nothing.

    model: the trunk. Its modules may also belong to an FSDPModule around it. active: returns True
    while surgery takes gradients.
    """

    def __init__(self, model: nn.Module, active: Callable[[], bool]) -> None:
        self._active = active
        owners = [module for module in model.modules() if module is model or is_fsdp_module(module)]
        nested: set[int] = set()
        self._found: dict[int, Tensor] = {}
        self._handles = []
        for owner in reversed(owners):  # the innermost first
            owned = [
                Owned(module, name, parameter)
                for module in owner.modules()
                if id(module) not in nested
                for name, parameter in module._parameters.items()
                if parameter is not None and is_sharded(parameter)
            ]
            nested |= {id(module) for module in owner.modules()}
            # Before forward, this hook runs after fully_shard's own. After forward, it runs before.
            self._handles.append(owner.register_forward_pre_hook(self._recording(owned)))
            if is_fsdp_module(owner):
                self._handles.append(owner.register_forward_hook(self._without_views, prepend=True))

    def of(self, parameter: nn.Parameter) -> Tensor:
        """Return the tensor in the graph, the parameter itself if no forward has gathered it."""
        return self._found.get(id(parameter), parameter)

    def check(self, name: str, module: nn.Module, owned: Sequence[Owned]) -> None:
        """Raise UserError if a module runs now while its parameters are sharded."""
        for item in owned:
            if is_sharded(getattr(item.holder, item.name)):
                raise UserError(
                    f"module {name} ({type(module).__name__}) runs while its parameter {item.name} is sharded: call "
                    "the module to which fully_shard was applied last, which gathers the parameters of all others, "
                    "not a part of it"
                )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _recording(self, owned: Sequence[Owned]) -> Any:
        def record(*_: Any) -> None:
            for item in owned:
                tensor = getattr(item.holder, item.name)
                if not is_sharded(tensor):
                    self._found[id(item.parameter)] = tensor

        return record

    def _without_views(self, _: nn.Module, args: object, output: Any) -> Any:
        """Return the output with copies of views; rules give views where plain layers do not.

        fully_shard puts a hook on each tensor of the output, which an operation in place on a view
        would lose.
        """
        if not self._active() or not any(x._base is not None for x in tensors_in(output)):
            return output
        try:
            return map_tensors(lambda x: x if x._base is None else x.clone(), output)
        except Unsupported:  # fully_shard warns of a view in an object of another kind
            return output


def is_fsdp_module(module: nn.Module) -> bool:
    """Return True for a module to which fully_shard was applied, without importing it."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
