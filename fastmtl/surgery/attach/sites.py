"""The modules of a model whose forward surgery replaces, and how each of them runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastmtl.errors import UserError, listed, quoted
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.rules.aliases import Owned
from fastmtl.surgery.rules.embedding import embedding_rule
from fastmtl.surgery.rules.rule import Rule
from fastmtl.surgery.rules.table import find_rule

# Classes that use parameters beneath them in tensors without rows, such as tables of relative
# positions, or with rows in another dimension than the first, as in LongformerSelfAttention. A
# class of a model file is given by its name.
PER_TASK: tuple[type[nn.Module] | str, ...] = (
    nn.MultiheadAttention,
    "DebertaEncoder",
    "DebertaV2Encoder",
    "MPNetEncoder",
    "T5Attention with relative_attention_bias",
    "UMT5Attention with relative_attention_bias",
    "MT5Attention with relative_attention_bias",
    "FunnelEncoder",
    "FunnelDecoder",
    "LongformerSelfAttention",
)
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)  # have parameters, but no forward


@dataclass
class Site:
    """A module with shared parameters.

    own: shared parameters that its forward reads. rule: for its class, None for the general rule.
    beneath: for a module that runs once per task, all shared parameters in it; else None. gathered:
    True once ZeRO 3 gathers all parameters that the module itself reads.
    around: True if it runs once per task and other sites are in it. inside: True for these.
    """

    name: str
    module: nn.Module
    own: list[Owned] = field(default_factory=list)
    rule: Rule | None = None
    beneath: list[Owned] | None = None
    gathered: bool = False
    around: bool = False
    inside: bool = False


def find_sites(
    model: nn.Module,
    shared: Collection[nn.Parameter],
    per_task_modules: Sequence[type[nn.Module] | str | nn.Module],
    per_task: str = PER_TASK_PASSES,
) -> list[Site]:
    """Return the sites of a model; the first one is the model itself.

    per_task_modules: classes, names of classes, names of modules, or modules, in addition to
    PER_TASK. per_task: of the target, for messages.
    Raises UserError for an entry that names nothing in the model, and for modules whose rows are
    not in the first dimension, such as torch's recurrent ones.
    """
    known = {id(parameter) for parameter in shared}
    modules = dict(model.named_modules())
    whole = set(_matching(PER_TASK, modules))  # names of modules that run once per task
    for entry in per_task_modules:
        found = set(_matching((entry,), modules))
        if not found:
            names = listed([f"{name} ({type(module).__name__})" for name, module in modules.items() if name], limit=12)
            raise UserError(
                f"per_task_modules: {quoted(getattr(entry, '__name__', entry))} names no module and no class in "
                f"{type(model).__name__}" + (f"; its modules are {names}" if names else "")
            )
        whole |= found
    sites, nested = [Site("", model)], set[str]()
    for name, module in modules.items():
        if isinstance(module, _CONTAINERS) or name in nested:
            continue
        own = list(_owned(module, known, nested, name))
        beneath = None
        if name in whole:
            beneath = [item for inner in module.modules() for item in _shared(inner, known)]
        if own or beneath:
            _check_layout(name, module, per_task)
            site = Site(name, module, own, find_rule(module), beneath)
            sites[0:1] = [site] if module is model else [sites[0]]
            if module is not model:
                sites.append(site)
    _find_nested(sites)
    return sites


def _find_nested(sites: Sequence[Site]) -> None:
    """Set `around` and `inside` of all sites."""
    once_per_task = {site.name: site for site in sites if site.beneath is not None or (site.own and site.rule is None)}
    for site in sites:
        parts = site.name.split(".") if site.name else []
        for depth in range(len(parts)):
            holder = once_per_task.get(".".join(parts[:depth]))
            if holder is not None:
                holder.around = site.inside = True


def _owned(module: nn.Module, known: Collection[int], nested: set[str], name: str) -> Iterator[Owned]:
    """Yield the shared parameters that the module's forward reads.

    These are its own, those of parameter lists in it, and the originals of parametrized ones. A
    parameter that a module inside has as well is read there: a head of transformers has its
    decoder's bias only for its name in checkpoints.
    nested: receives the names of modules whose parameters are counted here.
    """
    inside = {id(p) for child in module.children() for p in child.parameters()} if module._parameters else set()
    yield from (item for item in _shared(module, known) if id(item.parameter) not in inside)
    inner = [(key, child) for key, child in module.named_children() if isinstance(child, _CONTAINERS)]
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.Module)
        inner += module.parametrizations.named_modules(prefix="parametrizations")
    for key, holder in inner:
        nested.add(f"{name}.{key}" if name else key)
        yield from _shared(holder, known)


def _shared(holder: nn.Module, known: Collection[int]) -> Iterator[Owned]:
    for name, parameter in holder._parameters.items():
        if parameter is not None and id(parameter) in known:
            yield Owned(holder, name, parameter)


def _matching(entries: Sequence[type[nn.Module] | str | nn.Module], modules: dict[str, nn.Module]) -> Iterator[str]:
    for name, module in modules.items():
        for entry in entries:
            if isinstance(entry, str):
                kind, _, attribute = entry.partition(" with ")
                named = kind in {base.__name__ for base in type(module).__mro__} or (kind == name and name)
                if named and (not attribute or getattr(module, f"has_{attribute}", False)):
                    yield name
            elif module is entry or (isinstance(entry, type) and isinstance(module, entry)):
                yield name


def _check_layout(name: str, module: nn.Module, per_task: str) -> None:
    if isinstance(module, nn.RNNBase):
        raise UserError(
            f"module {name} ({type(module).__name__}) has states with the rows in the second dimension, and reads its "
            "weights from a list of its own, which one backward pass does not support: leave its parameters out of "
            f"`shared` (their gradient is then the plain sum), or use {per_task}"
        )
    if getattr(module, "batch_first", True) is False:
        raise UserError(
            f"module {name} ({type(module).__name__}) has batch_first=False: rows of the batch must be the first "
            "dimension, so create it with batch_first=True and give it [rows, length, size]"
        )


def check_kind(model: nn.Module, per_task: str) -> None:
    """Raise UserError for a model whose modules cannot be given another forward.

    per_task: of the target, for the message.
    """
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise UserError(
            "model: its parameters are sharded by FullyShardedDataParallel (FSDP1), which one backward pass does not "
            "support: use torch.distributed.fsdp.fully_shard, or DeepSpeed's ZeRO 3"
        )
    if "DataParallel" in kinds:
        raise UserError("model: torch.nn.DataParallel copies the model for each device: use DistributedDataParallel")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError(
            f"model: a ScriptModule has no forward that can be replaced: give the model itself, or use {per_task}"
        )


# Number of rows up to which a table is a dense part of J, which is cheaper: every text uses most
# rows of a position or token type table.
_LARGE_TABLE = 2048


def large_tables(model: nn.Module, shared: Collection[nn.Parameter]) -> list[nn.Parameter]:
    """Return the large shared tables that only an nn.Embedding of the model uses."""
    known, uses, tables = {id(parameter) for parameter in shared}, Counter[int](), dict[int, nn.Parameter]()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in known:
                uses[id(parameter)] += 1
                if find_rule(module) is embedding_rule and whole_shape(parameter)[0] > _LARGE_TABLE:
                    tables[id(parameter)] = parameter
    return [table for key, table in tables.items() if uses[key] == 1]
