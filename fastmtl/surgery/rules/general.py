"""Any module: one run for each task on that task's rows, with aliases of its parameters.

No formula of the module is needed. A task without rows runs too, on a row of another task: in ZeRO
3, every rank must call the same modules in the same order.

With rows of several tasks, a "task" is here a set of tasks that a row has (attach/several.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.rules.aliases import Owned, aliases, replaced
from fastmtl.surgery.rules.trees import Unsupported, join_trees, map_tensors, tensors_in
from fastmtl.surgery.sinks.sink import Sink

# Arguments that are the same for all rows if they have two dimensions, by class.
WHOLE: Mapping[type[nn.Module], tuple[str, ...]] = {nn.MultiheadAttention: ("attn_mask",)}
# The argument with the positions of a text's tokens, the same for all rows, which older versions of
# transformers give to attention.
_POSITIONS = "cache_position"


class Divides(Protocol):
    """The part of a RowMap that this rule uses."""

    batch: int

    @property
    def groups(self) -> list[int]: ...
    def task_of(self, part: int) -> int: ...
    def fits(self, rows: int) -> bool: ...
    def split(self, x: Tensor) -> tuple[Tensor, ...]: ...
    def join(self, parts: Sequence[Tensor]) -> Tensor: ...
    def spread(self, parts: Sequence[Tensor]) -> Tensor: ...


class RunTask(Protocol):
    """Function that runs a module on one task's rows. one_row: its inputs are the same for all."""

    def __call__(self, task: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, one_row: bool) -> Any: ...


def run_by_task(
    run: RunTask,
    owned: Sequence[Owned],
    rows: Divides,
    sink: Sink,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    whole: Collection[str] = (),
) -> Any:
    """Return a module's output for its arguments, computed for one task after the other.

    run: runs the module. owned: parameters of which each task uses an alias. whole: keyword
    arguments that every task gets as they are if they have two dimensions.
    Raises Unsupported for arguments and outputs that are neither rows of the batch nor one row.
    """
    tasks, cut = range(len(rows.groups)), dict(kwargs)
    uncut = {name: cut.pop(name) for name in whole if isinstance(cut.get(name), Tensor) and cut[name].dim() == 2}
    if isinstance(cut.get(_POSITIONS), Tensor):
        uncut[_POSITIONS] = cut.pop(_POSITIONS)
    wanted = [item for item in owned if sink.wants(item.parameter)]
    by_parameter = {id(item.parameter): item for item in wanted}  # a tied parameter has several places
    made = {key: aliases(item, tasks, rows.task_of, sink) for key, item in by_parameter.items()}
    tensors = [x for x in tensors_in((args, cut)) if x.dim()]
    one_row = rows.batch != 1 and bool(tensors) and all(len(x) == 1 for x in tensors)
    if not tensors:
        raise Unsupported("no argument that holds rows, so its parameters belong to no task")
    parts: dict[int, tuple[Tensor, ...]] = {}

    def part(task: int) -> Callable[[Tensor], Tensor]:
        def of_task(x: Tensor) -> Tensor:
            if one_row or x.dim() == 0 or (len(x) == 1 and rows.batch != 1):
                return x
            if not rows.fits(len(x)):
                raise Unsupported(
                    f"an argument of shape {tuple(x.shape)}, whose first dimension is neither the {rows.batch} rows, "
                    "a multiple of them, nor 1"
                )
            if id(x) not in parts:
                parts[id(x)] = rows.split(x)
            return parts[id(x)][task]

        return of_task

    outputs = []
    for task in tasks:
        cut_args, cut_kwargs = map_tensors(part(task), args), map_tensors(part(task), cut)
        with replaced([(item, made[id(item.parameter)][task]) for item in wanted]):
            outputs.append(run(task, cut_args, {**cut_kwargs, **uncut}, one_row=one_row))
    return join_trees(lambda found: _join(rows, found), outputs)


def _join(rows: Divides, parts: Sequence[Tensor]) -> Tensor:
    sizes = [size or min(rows.batch, 1) for size in rows.groups]  # one row runs for a task without rows
    if all(part.dim() and part.shape[1:] == parts[0].shape[1:] for part in parts):
        factors = {len(part) // size for part, size in zip(parts, sizes, strict=True) if size}
        k = factors.pop() if len(factors) == 1 else (0 if factors else 1)
        if k and all(len(part) == size * k for part, size in zip(parts, sizes, strict=True)):
            return rows.join(parts)
        if all(len(part) == 1 for part in parts):
            return rows.spread(parts)
    shapes = ", ".join(str(tuple(part.shape)) for part in parts)
    raise Unsupported(f"outputs of shapes {shapes} for tasks with {sizes} rows: neither rows of the batch nor one row")


class UnsupportedModule(UserError):
    """The error for a module that cannot run task by task.

    what: the message without ways out. per_task: of the target.
    """

    def __init__(self, name: str, module: nn.Module, reason: Unsupported, per_task: str) -> None:
        self.what = f"module {name} ({type(module).__name__}) has {reason}"
        super().__init__(
            f"{self.what}: name a module around it in per_task_modules=[...], leave its parameters out of `shared` "
            f"(their gradient is then the plain sum), or use {per_task}"
        )
