"""The choice of the parameters whose task gradients are merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fastmtl.errors import UserError, quoted
from fastmtl.surgery.attach.sites import large_tables
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.targets.protocol import Target


def choose_parameters(
    target: Target,
    model: nn.Module | None,
    shared: Iterable[nn.Parameter] | None,
    sparse: Iterable[nn.Parameter] | None,
    *,
    attaches: bool,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained shared parameters, each once, and the tables with compact rows.

    shared, sparse: as in GradientSurgery. attaches: True if modules of `model` separate the tasks.

    Raises UserError for anything that is not a parameter, for parameters of another model, and for
    `sparse` parameters that are not shared embedding tables.
    """
    given = None if shared is None else check_parameters("shared", shared)
    if given is None and model is not None:
        given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sparse is not None:
        tables = check_parameters("sparse", sparse)
    else:
        tables = large_tables(model, given or ()) if model is not None and attaches else []
    found = list(target.parameters) if given is None else _of_target(target, given)
    _check_tables(tables, found)
    return found, tables


def check_parameters(argument: str, given: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return each parameter once, in the given order.

    Raises UserError, naming `argument`, for anything that is not a parameter.
    """
    advice = f"give parameters, for example {argument}=model.encoder.parameters()"
    if isinstance(given, Tensor | nn.Module | str) or not isinstance(given, Iterable):
        raise UserError(f"{argument} is of type {type(given).__name__}, not a list: {advice}")
    unique = {}
    for item in given:
        if isinstance(item, tuple):
            raise UserError(f"{argument} has pairs of names and parameters: use parameters() for named_parameters()")
        if not isinstance(item, Tensor):
            raise UserError(f"{argument} has {quoted(item)}, which is no parameter: {advice}")
        unique[id(item)] = item
    return list(unique.values())


def check_sharded(target: Target, shared: Sequence[nn.Parameter], model: nn.Module | None, passes: str) -> None:
    """Raise UserError where surgery cannot follow parameters of fully_shard from forward on."""
    if not target.sharded:
        return
    if model is None or passes != "one":
        raise UserError(
            "target: fully_shard gives modules other tensors than the optimiser's for their forward, so surgery needs "
            'the modules: give GradientSurgery(..., model=trunk), with passes="one"'
        )
    in_model = {id(parameter) for parameter in model.parameters()}
    outside = [parameter for parameter in shared if id(parameter) not in in_model]
    if outside:
        raise UserError(
            f"shared: {len(outside)} parameters are not in `model` (the first has shape {tuple(outside[0].shape)}): "
            "under fully_shard, give a `model` that has all shared parameters"
        )


def _of_target(target: Target, shared: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the trained ones of `shared`. Raise UserError for parameters of another model."""
    trainable = {id(p) for p in target.parameters}
    foreign = [whole_shape(p) for p in shared if p.requires_grad and id(p) not in trainable]
    if foreign and target.sharded:
        raise UserError(
            f"shared: {len(foreign)} parameters are not the optimiser's (the first has shape {tuple(foreign[0])}): "
            "make the optimiser after fully_shard; after a forward, call reshard() on the model, so that its "
            "modules have the optimiser's parameters again"
        )
    if foreign:
        raise UserError(
            f"shared: {len(foreign)} parameters are not the target's (the first has shape "
            f"{tuple(foreign[0])}): make the target of the model that has them"
        )
    return target.arranged([p for p in shared if id(p) in trainable])


def _check_tables(sparse: Sequence[nn.Parameter], shared: Sequence[nn.Parameter]) -> None:
    """Raise UserError for `sparse` parameters that are not shared embedding tables."""
    known = {id(p) for p in shared}
    for table in sparse:
        if table.requires_grad and id(table) not in known:
            raise UserError(f"sparse: a parameter of shape {tuple(whole_shape(table))} is not among the shared ones")
        if len(whole_shape(table)) != 2:
            raise UserError(f"sparse: an embedding table has two dimensions, got {tuple(whole_shape(table))}")
