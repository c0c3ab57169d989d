"""Model whose many parameters are views of a few flat ones, to save time in DeepSpeed.

DeepSpeed runs Python hooks and about forty operators for every parameter in every step; `python
benchmarks/engine_calls.py` counts them. Surgery needs no hooks on the model's own parameters. So
these can be views of a few flat parameters, and DeepSpeed manages only the flat ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.parameters import check_parameters


class FlatParameters(nn.Module):
    """Model for `deepspeed.initialize`, whose trained parameters are views of few flat ones.

        flat = FlatParameters(model, groups, alone=[word_embeddings.weight])
        optimizer = AdamW(flat.groups, lr=1e-4)
        engine, *_ = deepspeed.initialize(model=flat, optimizer=optimizer, config=config)
        surgery = GradientSurgery(engine, tasks=tasks)

    There is one flat parameter per group. The model keeps its parameters: names, shapes, state_dict
    and load_state_dict are unchanged. DeepSpeed's checkpoints store them under the model's names,
    and its optimizer state under the flat ones.

    Supports ZeRO 0, 1 and 2 without offload, and gradients by GradientSurgery:
    `engine.backward(loss)` finds no gradient. Optimizers that treat each tensor separately (LAMB,
    Adafactor, Muon) would see other tensors than the model's.

    Args:
        model: the model whose trained parameters become views.
        groups: parameter groups of the optimizer; every trained parameter is in one of them.
        alone: parameters that stay separate. Use it for embedding tables: their gradients are
            tensors of their own, which would be copied into a flat gradient.

    Attributes:
        flat: the flat parameters, one-dimensional, each as long as its group's parameters together.
        groups: the groups for the optimizer.

    Raises:
        UserError: a group of several dtypes or devices; a parameter that is not trained or listed
            twice.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]], alone: Sequence[nn.Parameter] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.flat = nn.ParameterList()
        self.groups: list[dict[str, Any]] = []
        self._members: list[list[nn.Parameter]] = []
        self._alone: list[nn.Parameter] = []
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        apart, seen = {id(parameter) for parameter in check_parameters("alone", alone)}, set[int]()
        for group in groups:
            params = group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)  # as in torch's optimizers
            check_parameters("params", params)
            members = [parameter for parameter in params if id(parameter) not in apart]
            for parameter in params:
                if id(parameter) not in names or not parameter.requires_grad or id(parameter) in seen:
                    name = names.get(id(parameter), f"of shape {tuple(parameter.shape)}")
                    raise UserError(f"groups: parameter {name} is not the model's, not trained, or listed twice")
                seen.add(id(parameter))
            given = [parameter for parameter in params if id(parameter) in apart]
            self._alone += given
            if members:
                given.append(_joined_parameter(members))
                self.flat.append(given[-1])
                self._members.append(members)
            self.groups.append({**group, "params": given})
        self._places: list[tuple[int, torch.dtype] | None] = [None] * len(self._members)
        self.take_views()

    def take_views(self) -> None:
        """Recreate the model's views where DeepSpeed has moved or cast the flat parameters."""
        for k, (flat, members) in enumerate(zip(self.flat, self._members, strict=True)):
            place = flat.data_ptr(), flat.dtype
            if place != self._places[k]:
                pieces = flat.data.split([parameter.numel() for parameter in members])
                for parameter, piece in zip(members, pieces, strict=True):
                    parameter.data = piece.view(parameter.shape)
                self._places[k] = place

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.take_views()
        return self.model(*arguments, **keywords)

    def leaves(self) -> list[nn.Parameter]:
        """Return the model's trained parameters: those of each flat one, then the separate ones."""
        return [*(parameter for members in self._members for parameter in members), *self._alone]

    def trained(self) -> list[nn.Parameter]:
        """Return the flat parameters, then the separate ones."""
        return [*self.flat, *self._alone]

    def gather(self, gradients: Merged) -> list[Tensor]:
        """Return one gradient for each parameter of `trained`, in its order.

        gradients: those of `leaves` by id, which are removed. The parts of a flat gradient are
        copied only if they are not adjacent in memory.
        """
        flat = [gradients.take_joined([id(parameter) for parameter in members]) for members in self._members]
        return flat + [gradients.pop(id(parameter)) for parameter in self._alone]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that DeepSpeed manages: flat.0, flat.1, ..., then the separate and
        the untrained ones under the model's names.
        """
        yield from self.flat.named_parameters(f"{prefix}.flat" if prefix else "flat")
        views = {id(parameter) for members in self._members for parameter in members}
        for name, parameter in self.model.named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) not in views:
                yield name, parameter

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the model's state under its own names."""
        self.take_views()
        return self.model.state_dict(*arguments, **keywords)

    def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        self.take_views()
        return self.model.load_state_dict(*arguments, **keywords)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlatParameters:
        self.flat._apply(fn, recurse)
        self.take_views()  # else the model's parameters would be copied too
        super()._apply(fn, recurse)
        self.take_views()
        return self


def whole_model(engine: Any) -> Any:
    """Return the callable model inside a DeepSpeed engine."""
    if isinstance(engine.module, FlatParameters):
        engine.module.take_views()
        return engine.module.model
    return engine.module


def _joined_parameter(members: list[nn.Parameter]) -> nn.Parameter:
    kinds = {(parameter.dtype, parameter.device) for parameter in members}
    if len(kinds) > 1:
        raise UserError(f"groups: one has parameters of {' and '.join(sorted(map(str, kinds)))}: make a group of each")
    return nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in members]))
