"""The object that takes the place of a module's forward."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

# The reason in torch's and in surgery's errors.
OUTSIDE = "surgery runs modules with shared parameters outside of compiled graphs"


class Runs(Protocol):
    """Function that computes a module's forward, given the plain forward and its arguments."""

    def __call__(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def _call(forward: RuledForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward._run(forward._plain, args, kwargs)


class RuledForward:
    """Forward of one module, in the instance's `__dict__`, where it hides the class's `forward`.

    A copy and a pickle of the module have the plain forward: its parameters are other objects, of
    which surgery knows nothing. `inspect.signature` finds the plain signature by `__wrapped__`.

    call: the one function that all calls go through, so that a compiled graph fits equal layers.
    """

    call = staticmethod(_call)

    def __init__(self, module: nn.Module, run: Runs) -> None:
        self._module, self._before = module, module.__dict__.get("forward")
        self._plain: Callable[..., Any] = module.forward
        self._run = run
        functools.update_wrapper(self, self._plain)
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return RuledForward.call(self, args, kwargs)

    @property
    def in_place(self) -> bool:
        """True if the module still has this forward."""
        return self._module.__dict__.get("forward") is self

    def restore(self) -> None:
        """Give the module the forward that it had before."""
        if self._before is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain, memo)  # a method of the copy: `memo` has the module's copy already

    def __reduce__(self) -> Any:
        if self._before is None:
            return getattr, (self._module, "forward")
        return _same, (self._before,)


def leave_graphs() -> None:
    """Keep all modules with another forward out of the graphs of torch.compile.

    A graph that contained one would call the sink while it is traced, and never again. Does
    nothing before the first torch.compile.
    """
    if RuledForward.call is _call and compiler_is_imported():
        RuledForward.call = staticmethod(torch.compiler.disable(_call, reason=OUTSIDE))


def compiler_is_imported() -> bool:
    """Return True after the first torch.compile; the import takes a second."""
    return "torch._dynamo" in sys.modules


def _same(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward
