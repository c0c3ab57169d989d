"""TorchJD's Gramian weightings as gradient methods, through the extra `fastmtl[torchjd]`.

Each has its class's name in lower case without `Weighting`: upgrad, mgda, cagrad, imtlg, alignedmtl, dualproj, ...
They work on the host in TorchJD's own precision; rank 0 solves and the others take its weights. Left out: weightings
that need J itself, and PCGrad and GradVac, which fastmtl computes on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl.errors import UserError, unknown_name
from fastmtl.surgery.reduce import world_size

_OURS = {"pcgrad", "gradvac"}


def why_unavailable() -> str:
    """The reason why there are none here, "" where there are."""
    return "" if find_spec("torchjd") else "TorchJD's methods need: pip install 'fastmtl[torchjd]'"


@cache
def _classes() -> dict[str, type[nn.Module]]:
    if why_unavailable():
        return {}
    from torchjd import aggregation

    found = {}
    for name, value in vars(aggregation).items():
        stem = name.removesuffix("Weighting").lower()
        on_gramian = inspect.isclass(value) and any(base.__name__ == "_GramianWeighting" for base in value.__mro__)
        if name.endswith("Weighting") and on_gramian and stem not in _OURS:
            found[stem] = value
    return found


def names() -> list[str]:
    return sorted(_classes())


def knows(name: str) -> bool:
    return name in _classes()


class TorchJDMethod:
    """One of TorchJD's weightings by name. options: what its class takes by keyword; lists become tensors."""

    by_rank = by_tensor = False

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        kind = _classes()[name]
        allowed = inspect.signature(kind).parameters
        for key in options:
            if key not in allowed:
                raise unknown_name(f"option of {name}", key, allowed)
        for key, parameter in allowed.items():
            if parameter.default is parameter.empty and key not in options:
                raise UserError(f"gradient method {name} needs the option {key} (see TorchJD's {kind.__name__})")
        values = {k: torch.tensor(v, dtype=torch.float32) if isinstance(v, list) else v for k, v in options.items()}
        try:
            self._weighting = kind(**values)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"gradient method {name}: {error}") from None

    def weights(self, gram: Tensor, order: Tensor, index: int | None) -> Tensor:
        weights = torch.zeros(len(gram), device=gram.device)
        if world_size() == 1 or dist.get_rank() == 0:
            host = gram.detach().cpu()
            # Not every solver comes back from what is not finite; its step is skipped anyway.
            solved = self._weighting(host) if bool(host.isfinite().all()) else torch.full((len(gram),), float("nan"))
            weights.copy_(solved)
        if world_size() > 1:
            dist.broadcast(weights, 0)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Moving averages and counters of a stateful weighting, as numbers and lists."""
        plain = set(vars(nn.Module()))
        attributes = {k: v for k, v in vars(self._weighting).items() if k not in plain}
        return {
            "attributes": {k: v for k, v in attributes.items() if v is None or isinstance(v, (bool, int, float))},
            "buffers": {
                name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
                for name, value in self._weighting.named_buffers()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state["attributes"].items():
            setattr(self._weighting, name, value)
        for name, value in state["buffers"].items():
            setattr(self._weighting, name, torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])))
