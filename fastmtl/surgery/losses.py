"""Checks of the losses and counts that a user gives."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmtl.errors import UserError, listed, quoted

Losses = Mapping[str, tuple[Tensor, int]]

_EXPECTED = "give {task: (sum of its rows' losses, number of rows)}"


def check_losses(losses: Losses, tasks: list[str], *, constants: bool = False) -> None:
    """Raise UserError, naming the task, unless each task has a scalar tensor and a number of rows.

    constants: allow losses that depend on no trained parameter, such as those of a head without
    parameters on a frozen encoder.
    """
    if isinstance(losses, tuple):
        raise UserError(f"the losses are a tuple: {_EXPECTED}; to return (losses, features), set features=True in run")
    if not isinstance(losses, Mapping):
        raise UserError(f"the losses are of type {type(losses).__name__}: {_EXPECTED}")
    unknown = [name for name in losses if name not in tasks]
    if unknown:
        raise UserError(f"losses of {listed(unknown)} were given, tasks are {listed(tasks)}")
    if not losses:
        raise UserError("no loss was given: give every task that the model ran, without rows a zero of its head")
    for name, entry in losses.items():
        _check_entry(name, entry, constants)


def check_counts(counts: Mapping[str, int], tasks: list[str], argument: str = "counts") -> None:
    """Raise UserError, naming `argument`, for an unknown task and an invalid number of rows."""
    if not isinstance(counts, Mapping):
        raise UserError(f"{argument}: got an object of type {type(counts).__name__}: give {{task: number of rows}}")
    unknown = [name for name in counts if name not in tasks]
    if unknown:
        raise UserError(f"{argument}: of {listed(unknown)}, tasks are {listed(tasks)}")
    for name, rows in counts.items():
        _check_rows(f"{argument}: task {name}", rows)


def _check_entry(name: str, entry: Any, constants: bool) -> None:
    where = f"the loss of task {name}"
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise UserError(f"{where} is of type {type(entry).__name__}, not a pair: {_EXPECTED}")
    loss, rows = entry
    if not isinstance(loss, Tensor):
        raise UserError(
            f"{where} is {quoted(loss)}, not a tensor: leave a task without rows out, or give it a zero of its head "
            "(the sum of the head's outputs times 0)"
        )
    if loss.dim():
        raise UserError(
            f"{where} has shape {tuple(loss.shape)}: give one number, the sum of the rows' losses "
            '(reduction="sum", or .sum())'
        )
    if _check_rows(where, rows) and not loss.requires_grad and not constants:
        raise UserError(
            f"{where} has {rows} rows, but depends on no parameter that is trained: look for detach(), item() or "
            "torch.no_grad() in the model, or leave the task out"
        )


def _check_rows(where: str, rows: Any) -> int:
    try:
        number = operator.index(rows)
    except TypeError:
        raise UserError(f"{where}: its number of rows is {quoted(rows)}: give an integer") from None
    if number < 0:
        raise UserError(f"{where}: its number of rows is {number}: give 0 or more")
    return number
