"""TorchJD's Gramian weightings as gradient methods, through the extra `fastmtl-torch[torchjd]`.

The names are the class names in lower case without `Weighting`: upgrad, mgda, cagrad, imtlg,
alignedmtl, dualproj, ... Weightings that need J itself are left out, and so are PCGrad and GradVac,
which fastmtl computes on the device.

- Weightings run on the host, in TorchJD's own precision. Rank 0 solves and sends the weights.
- A task without a gradient in a step gets weight 0 and is left out of the problem: solvers take a
  zero gradient for the best possible compromise.
- Some solvers treat a G with a trace below an absolute bound as zero, or stop too early on it. A
  small G is therefore multiplied by a power of two.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl.errors import UserError, unknown_name
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.ranks.collectives import world_size

_NATIVE = {"pcgrad", "gradvac"}
# Weightings that do not depend on G's scale, unless its trace is below TorchJD's `norm_eps`, 1e-4.
_SCALE_FREE = {"cagrad", "dualproj", "upgrad"}
# G is solved unscaled if its trace is at least this.
_MIN_TRACE = 1e-2


def unavailable_reason() -> str:
    """Return the reason why TorchJD's methods are unavailable; "" if they are available."""
    return "" if find_spec("torchjd") else "TorchJD's methods need: pip install 'fastmtl-torch[torchjd]'"


@cache
def _classes() -> dict[str, type[nn.Module]]:
    if unavailable_reason():
        return {}
    from torchjd import aggregation

    found = {}
    for name, value in vars(aggregation).items():
        stem = name.removesuffix("Weighting").lower()
        on_gramian = inspect.isclass(value) and any(base.__name__ == "_GramianWeighting" for base in value.__mro__)
        if name.endswith("Weighting") and on_gramian and stem not in _NATIVE:
            found[stem] = value
    return found


def names() -> list[str]:
    return sorted(_classes())


def has(name: str) -> bool:
    return name in _classes()


class TorchJDMethod:
    """One of TorchJD's weightings by name.

    options: keyword arguments of its class; lists become tensors.
    """

    by_rank = by_tensor = False

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        weighting_class = _classes()[name]
        allowed = inspect.signature(weighting_class).parameters
        for key in options:
            if key not in allowed:
                raise unknown_name(f"option of {name}", key, allowed)
        for key, parameter in allowed.items():
            if parameter.default is parameter.empty and key not in options:
                raise UserError(
                    f"gradient method {name} needs the option {key} (see TorchJD's {weighting_class.__name__})"
                )
        self._name, self._weighting_class = name, weighting_class
        self._values = {
            k: torch.tensor(v, dtype=torch.float32) if isinstance(v, list) else v for k, v in options.items()
        }
        try:
            self._weighting = weighting_class(**self._values)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"gradient method {name}: {error}") from None

    def weights(self, gramian: Tensor, order: Tensor) -> Tensor:
        """Return weights [T], solved on rank 0 and sent to all ranks. order: unused."""
        gram = gramian
        result = torch.zeros(len(gram) + 1, device=gram.device)  # the last number is 1 if rank 0 failed
        failure = ""
        if world_size() == 1 or dist.get_rank() == 0:
            try:
                result[:-1] = self._solve(gram.detach().cpu())
            except Exception as error:  # TorchJD's or its solver's error; the other ranks wait for the broadcast
                failure, result[-1] = f": {error or type(error).__name__}", 1
        if world_size() > 1:
            dist.broadcast(result, 0)
        if result[-1] > 0:
            raise UserError(f"gradient method {self._name} cannot solve this step's tasks{failure}")
        return result[:-1]

    def _solve(self, gram: Tensor) -> Tensor:
        if not bool(gram.isfinite().all()):  # a solver may never return; the step is skipped anyway
            return torch.full((len(gram),), float("nan"))
        present = (gram.diagonal() > 0).nonzero().squeeze(1)
        gram, factor = self._scaled(gram)
        if len(present) == len(gram) or dict(self._weighting.named_buffers()):  # its state is about all tasks
            return self._weighting(gram) * factor
        weights = torch.zeros(len(gram))
        if len(present):
            values = {k: v[present] if isinstance(v, Tensor) else v for k, v in self._values.items()}
            weights[present] = self._weighting_class(**values)(gram[present][:, present]) * factor
        return weights

    def _scaled(self, gram: Tensor) -> tuple[Tensor, float]:
        """Return G, scaled by a power of two if its trace is small, and a factor.

        The weights that TorchJD finds for the scaled G, times the factor, are the weights for G.
        """
        trace = float(gram.diagonal().double().sum())
        given = self._values.keys() & {"norm_eps", "projector"}  # a bound given by the user is for the unscaled G
        if not 0 < trace < _MIN_TRACE or given:
            return gram, 1.0
        exponent = 1 - math.frexp(trace)[1]  # scales the trace to [1, 2)
        alpha = float(self._values.get("alpha", 0))
        if self._name in _SCALE_FREE:
            factor = 1.0
        elif self._name == "fairgrad" and alpha > 0:  # w solves G w = w ** (-1 / alpha)
            factor = 2.0 ** (exponent * alpha / (1 + alpha))
        else:
            return gram, 1.0
        return (gram.double() * 2.0**exponent).to(gram.dtype), factor

    def of_tensor(self, index: int) -> Method:
        """Raise AssertionError, since a solver on the host does not run inside backward."""
        raise AssertionError(f"{self._name} solves on the host")

    def state_dict(self) -> dict[str, Any]:
        """Return moving averages and counters of a stateful weighting, as numbers and lists."""
        plain = set(vars(nn.Module()))
        attributes = {k: v for k, v in vars(self._weighting).items() if k not in plain}
        return {
            "attributes": {k: v for k, v in attributes.items() if v is None or isinstance(v, (bool, int, float))},
            "buffers": {
                name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
                for name, value in self._weighting.named_buffers()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["attributes"].items():
            setattr(self._weighting, name, value)
        for name, value in state["buffers"].items():
            setattr(self._weighting, name, torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])))
