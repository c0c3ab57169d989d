"""Memory and passes of each way to keep the task gradients of a model, before any step runs.

`storage_costs` reads shapes only, so it also works for a model on the device "meta".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from fastmtl.errors import UserError
from fastmtl.surgery.attach.forward import RuledForward
from fastmtl.surgery.attach.sites import find_sites, large_tables
from fastmtl.surgery.checks import check_tasks
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.parameters import check_parameters
from fastmtl.surgery.rules.embedding import embedding_rule
from fastmtl.surgery.rules.linear import linear_rule
from fastmtl.surgery.rules.transposed_linear import transposed_linear_rule

_FLOAT32, _BFLOAT16, _INT64 = 4, 2, 8
_MIB, _KIB = 2**20, 2**10


@dataclass(frozen=True)
class StorageCost:
    """The memory and the passes of a step with one storage, on one rank with one micro-batch.

    storage: "stacked", "kept", "replay", "tensor" (the scope), or "per_task" (T passes).
    nbytes: bytes that do not depend on the batch, with J in float32: J itself, or the buffers that
    replace it.
    bfloat16: the same with `dtype=torch.bfloat16`; None if no J is stored.
    per_row: bytes for each row (token) that the layers get. For "kept" these are the gradients of
    the layers' outputs, beside the inputs that forward keeps for backward anyway. For sparse tables
    they are an id and a row of the table's width.
    forwards, backwards: passes over the model. With "per_task" each backward goes over all rows.
    """

    storage: str
    nbytes: int
    bfloat16: int | None
    per_row: int
    forwards: int = 1
    backwards: int = 1

    def at(self, rows: int) -> int:
        """Return the bytes of a step in which the layers get `rows` rows, with J in float32."""
        return self.nbytes + rows * self.per_row


@dataclass(frozen=True)
class StorageCosts:
    """The costs of all storages for one model; `str()` gives a table, `costs["kept"]` one cost.

    tasks: T. dense, sparse: the numbers in dense shared parameters, and in sparse tables. rows: as
    given to `storage_costs`.
    """

    tasks: int
    dense: int
    sparse: int
    costs: tuple[StorageCost, ...]
    rows: int | None = None

    def __getitem__(self, storage: str) -> StorageCost:
        return next(cost for cost in self.costs if cost.storage == storage)

    def __iter__(self) -> Iterator[StorageCost]:
        return iter(self.costs)

    def __str__(self) -> str:
        headers = ["storage", "MiB", "with bfloat16", "KiB per row", "forward", "backward"]
        lines = [headers if self.rows is None else [*headers, f"MiB with {self.rows:,} rows"]]
        for cost in self.costs:
            narrow = "" if cost.bfloat16 is None else f"{cost.bfloat16 / _MIB:,.1f}"
            cells = [cost.storage, f"{cost.nbytes / _MIB:,.1f}", narrow, f"{cost.per_row / _KIB:,.1f}"]
            cells += [str(cost.forwards), str(cost.backwards)]
            lines.append(cells if self.rows is None else [*cells, f"{cost.at(self.rows) / _MIB:,.1f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        title = f"{self.tasks} tasks, {self.dense:,} dense shared numbers, {self.sparse:,} in sparse tables"
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        return "\n".join([title, *table])


def storage_costs(
    model: nn.Module,
    *,
    tasks: int | Sequence[str],
    shared: Iterable[nn.Parameter] | None = None,
    sparse: Iterable[nn.Parameter] | None = None,
    per_task_modules: Sequence[type[nn.Module] | str | nn.Module] = (),
    rows: int | None = None,
) -> StorageCosts:
    """Return bytes and passes of each storage for the task gradients of `model`.

    Args:
        model: the trunk, as in GradientSurgery(..., model=model). No step runs.
        tasks: their number or names.
        shared: parameters to merge; default: the model's trained ones.
        sparse: embedding tables whose gradients are kept only for the rows in use; default: as
            in GradientSurgery, the large tables that only an nn.Embedding uses.
        per_task_modules: as in GradientSurgery.
        rows: rows that the layers get in a step, for the last column of the table: tokens of a
            padded batch, for a text encoder.

    Raises:
        UserError: anything in `shared` or `sparse` that is not a parameter of the model; an entry
            of `per_task_modules` that names nothing; a model to which surgery is attached.
    """
    number = tasks if isinstance(tasks, int) else len(check_tasks(tasks))
    if any(isinstance(vars(module).get("forward"), RuledForward) for module in model.modules()):
        raise UserError("model: a GradientSurgery is attached to it: call storage_costs before, or after its detach()")
    merged = _of_model("shared", model, model.parameters() if shared is None else shared)
    ids = {id(parameter) for parameter in merged}
    tables = large_tables(model, merged) if sparse is None else _of_model("sparse", model, sparse)
    compact = {id(table) for table in tables if id(table) in ids}
    dense = [parameter for parameter in merged if id(parameter) not in compact]
    sites = find_sites(model, merged, per_task_modules)
    aliased = {id(owned.parameter) for site in sites for owned in site.beneath or ()}
    uses = [(site.rule, owned.parameter) for site in sites for owned in site.own if id(owned.parameter) not in aliased]
    pairs = [p for rule, p in uses if rule in (linear_rule, transposed_linear_rule) and p.dim() == 2]
    lookups = [p for rule, p in uses if rule is embedding_rule]
    weights, wide = set(map(id, pairs)), set(map(id, lookups))
    plain = sum(_numel(parameter) for parameter in dense if id(parameter) not in weights)
    rows_of_tables = sum(_INT64 + whole_shape(p)[1] * p.element_size() for p in lookups if id(p) in compact)
    outputs = sum(whole_shape(weight)[0] * weight.element_size() for weight in pairs)
    # Gradients of a dense table are added up in float32.
    piece = number * max((_numel(p) * (_FLOAT32 if id(p) in wide else p.element_size()) for p in dense), default=0)
    product = number * max((_numel(p) * p.element_size() for p in pairs), default=0)
    numbers = number * sum(map(_numel, dense))
    j = numbers * _FLOAT32, numbers * _BFLOAT16
    return StorageCosts(
        number,
        sum(map(_numel, dense)),
        sum(_numel(table) for table in tables if id(table) in compact),
        (
            StorageCost("stacked", *j, rows_of_tables),
            StorageCost("kept", number * plain * _FLOAT32 + product, None, outputs + rows_of_tables),
            StorageCost("replay", piece, None, rows_of_tables, forwards=2, backwards=2),
            StorageCost("tensor", piece, None, 0),
            StorageCost("per_task", *j, rows_of_tables, backwards=number),
        ),
        rows,
    )


def _of_model(argument: str, model: nn.Module, given: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the trained ones of the given parameters. Raise UserError for another model's."""
    known, found = {id(parameter) for parameter in model.parameters()}, check_parameters(argument, given)
    for parameter in found:
        if id(parameter) not in known:
            raise UserError(f"{argument}: a parameter of shape {tuple(whole_shape(parameter))} is not in the model")
    return [parameter for parameter in found if parameter.requires_grad]


def _numel(parameter: nn.Parameter) -> int:
    return whole_shape(parameter).numel()
