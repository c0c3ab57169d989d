"""Gradient methods by name.

To add a method, write its class in a file of this folder and enter its name in METHODS. The names
of TorchJD's weightings come from torchjd.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastmtl.errors import UserError, listed, quoted, unknown_name
from fastmtl.surgery.methods import torchjd
from fastmtl.surgery.methods.equal import Equal
from fastmtl.surgery.methods.gradvac import GradVac
from fastmtl.surgery.methods.method import Method, Reduction
from fastmtl.surgery.methods.pcgrad import PCGrad

METHODS: dict[str, Callable[..., Method]] = {"pcgrad": PCGrad, "gradvac": GradVac, "equal": Equal}


def method_names() -> list[str]:
    """Return every name that `find_method` accepts, TorchJD's only if it is installed."""
    return ["sum", *METHODS, *torchjd.names()]


def find_method(name: str, reduction: Reduction = "sum", options: Mapping[str, Any] | None = None) -> Method | None:
    """Return the method with this name; None for `sum`, which needs no Gramian.

    options: keyword arguments of the method's class. Raises UserError for an unknown name or
    option.
    """
    options = dict(options or {})
    if not isinstance(name, str):
        raise UserError(f"gradient method: expected a name, got {quoted(name)}. Valid: {listed(method_names())}.")
    if reduction not in ("sum", "mean"):
        raise UserError(f"reduction must be sum or mean, got {reduction!r}")
    if name == "sum":
        if options:
            raise UserError(f"gradient method sum takes no options, got {', '.join(options)}")
        return None
    if name in METHODS:
        takes = inspect.signature(METHODS[name]).parameters
        allowed = [key for key in takes if key != "reduction"]
        for key in options:
            if key not in allowed:
                raise unknown_name(f"option of {name}", key, allowed)
        if "reduction" in takes:
            options["reduction"] = reduction
        elif reduction != "sum":
            raise UserError(f"reduction={reduction!r} is not for {name}, which scales its weights itself")
        return METHODS[name](**options)
    if torchjd.has(name):
        if reduction != "sum":
            raise UserError(f"reduction={reduction!r} is for pcgrad and gradvac; {name} scales its weights itself")
        return torchjd.TorchJDMethod(name, options)
    raise unknown_method("gradient method", name, method_names())


def unknown_method(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown method, which TorchJD may have if it is not installed."""
    error, reason = unknown_name(what, name, known), torchjd.unavailable_reason()
    return UserError(f"{error} ({reason})") if reason else error
