"""The error for a parameter that was frozen or unfrozen after a target was created."""

from __future__ import annotations

from torch import nn

from fastmtl.errors import UserError


def changed(name: str, parameter: nn.Parameter, what: str) -> UserError:
    """Return the error for parameter `name`. what: the objects to create anew after the change."""
    now, then = "frozen", "was trained"
    if parameter.requires_grad:
        now, then = "trained", "was frozen, or in no group of the optimiser,"
    return UserError(
        f"parameter {name} of shape {tuple(parameter.shape)} is {now}, but {then} when GradientSurgery was made: make "
        f"{what} anew after a change, and call load_state_dict(surgery.state_dict()) to continue"
    )
