"""Check that a module's runs per task give what one run gives; batch statistics, say, do not.

Both run without dropout, whose masks would differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastmtl.surgery.random_state import RandomState
from fastmtl.surgery.rules.trees import Unsupported, tensors_in
from fastmtl.surgery.verify.unchanged import unchanged

log = logging.getLogger(__name__)

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}


# Functions that drop inside, and the place of their argument `dropout_p`.
_DROP_INSIDE = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class WithoutDropout(TorchFunctionMode):
    """Mode in which torch's functions drop nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _DROP_INSIDE:
            place = _DROP_INSIDE[func]
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@torch.no_grad()  # the outputs may contain inputs, and checkpointing counts what autograd saves
def output_mismatch(
    name: str,
    module: nn.Module,
    run: Callable[[], Any],
    run_by_task: Callable[[], Any],
    device: torch.device,
    per_task: str,
) -> str | None:
    """Return a sentence if the outputs of `run` and `run_by_task` differ, None if they agree.

    A module that draws random numbers besides dropout cannot be compared; the log says so.
    Parameters, buffers and random state stay as they are. per_task: of the target. Raises
    Unsupported for an output whose first dimension is not the rows.
    """
    with WithoutDropout(), unchanged(device, module) as state:
        whole, draws = run(), _has_drawn(state)
        by_task = run_by_task()
    pairs = list(zip(tensors_in(whole), tensors_in(by_task), strict=True))
    for one, joined in pairs:
        if not _expands(one, joined):
            raise Unsupported(
                f"an output of shape {tuple(one.shape)} for the batch, but {tuple(joined.shape)} joined from its runs "
                "per task: its first dimension is not the rows"
            )
    if draws:
        log.warning(
            "module %s (%s) draws random numbers besides dropout, so that its outputs per task cannot be checked",
            name,
            type(module).__name__,
        )
        return None
    largest = max((_difference(*pair) for pair in pairs), default=0.0)
    if largest <= _tolerance([x for pair in pairs for x in pair]):
        return None
    return (
        f"module {name} ({type(module).__name__}) gives other outputs on the rows of each task than on the whole "
        f"batch (difference {largest:.1g} of their norm), so its rows mix, as in BatchNorm during training: put it "
        "into evaluation mode, use a normalization of single rows, leave its parameters out of `shared` and freeze its "
        f"statistics, or use {per_task}"
    )


def _expands(whole: Tensor, by_task: Tensor) -> bool:
    """Return True if `whole` has the shape of `by_task`, or one row for all rows of it."""
    return whole.shape[1:] == by_task.shape[1:] and whole.shape[:1] in (by_task.shape[:1], (1,))


def _has_drawn(state: RandomState) -> bool:
    now = RandomState.capture(state.device)
    return not torch.equal(now.cpu, state.cpu) or (
        now.cuda is not None and state.cuda is not None and not torch.equal(now.cuda, state.cuda)
    )


def _difference(whole: Tensor, by_task: Tensor) -> float:
    """Return the norm of the difference, relative to that of `whole`, which may have one row."""
    if not whole.is_floating_point():
        return 0.0 if torch.equal(whole.expand_as(by_task), by_task) else 1.0
    wide = whole.double().expand_as(by_task)
    norm = torch.linalg.vector_norm(wide).item()
    return torch.linalg.vector_norm(wide - by_task).item() / norm if norm else float(by_task.any().item())


def _tolerance(tensors: Sequence[Tensor]) -> float:
    """Return the bound of rounding errors; products of float32 numbers may be rounded to TF32."""
    narrow = torch.is_autocast_enabled(tensors[0].device.type) if tensors else False
    narrow = narrow or any(x.is_cuda or (x.is_floating_point() and x.dtype.itemsize < 4) for x in tensors)
    return 2e-2 if narrow else 1e-5
