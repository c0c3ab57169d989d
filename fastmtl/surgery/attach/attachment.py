"""Surgery inside a user's model: its modules pass one gradient per task to the sink.

Row maps are kept from a forward until the end of backward, since activation checkpointing runs
modules again during backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.attach.compiled import check_compiled, eager, explained
from fastmtl.surgery.attach.forward import RuledForward, leave_graphs
from fastmtl.surgery.attach.outputs import output_mismatch
from fastmtl.surgery.attach.position import Position
from fastmtl.surgery.attach.reading import RowTasks
from fastmtl.surgery.attach.row_map import OneTask, RowMap
from fastmtl.surgery.attach.several import SeveralTasks, passes_of
from fastmtl.surgery.attach.sites import Site, check_kind, find_sites
from fastmtl.surgery.attach.unsharded import Unsharded
from fastmtl.surgery.jacobian.tables import is_sharded
from fastmtl.surgery.ranks.collectives import union_over_ranks
from fastmtl.surgery.rules.aliases import Owned, aliases, replaced
from fastmtl.surgery.rules.embedding import embedding_rule
from fastmtl.surgery.rules.general import WHOLE, RunTask, UnsupportedModule, run_by_task
from fastmtl.surgery.rules.rule import Rule
from fastmtl.surgery.rules.trees import Unsupported, tensors_in
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.verify.unchanged import keep_buffers, unchanged

_WAYS_OUT = (
    "a module reads it that belongs to another one, or it is used outside of `model` or of surgery.rows: name the "
    "module that uses it in per_task_modules=[...], leave it out of `shared` (its gradient is then the plain sum), or "
    "use "
)


class Attachment:
    """Forwards of a model's modules, replaced so that they pass task gradients to a sink.

    Outside a `rows` block, without gradients, and while no sink is active, a module runs as before.

    model: the trunk, or a DistributedDataParallel of it. shared: parameters whose task gradients
    are taken. per_task_modules: see GradientSurgery. per_task: of the target, for messages.

    verifying: True to compare the outputs of modules that run once per task with those of one run;
    `output_mismatches` receives a sentence for each module whose outputs differ.

    Raises UserError for a model that cannot be attached.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: Sequence[nn.Parameter],
        tasks: Sequence[str],
        device: torch.device,
        per_task_modules: Sequence[type[nn.Module] | str | nn.Module] = (),
        per_task: str = PER_TASK_PASSES,
    ) -> None:
        self._tasks, self._device, self._per_task = list(tasks), device, per_task
        check_kind(model, per_task)
        trunk = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        sites = find_sites(trunk, shared, per_task_modules, per_task)
        check_compiled(trunk, sites, per_task)
        for site in sites:
            if isinstance(site.module.__dict__.get("forward"), RuledForward):
                raise UserError(
                    "model: another GradientSurgery is attached to it: call its detach() before creating a new one"
                )
        self._parameters = {
            (id(owned.holder), owned.name): owned.parameter
            for site in sites
            for owned in (*site.own, *(site.beneath or ()))
        }
        self._unsharded = Unsharded(trunk, lambda: self.active) if any(map(is_sharded, shared)) else None
        self.sink: Sink | None = None
        self._position = Position()
        self.verifying, self._until_end = False, ExitStack()
        self.output_mismatches: list[str] = []
        self._forwards = [RuledForward(site.module, partial(self._run, site)) for site in sites]
        leave_graphs()
        self._names = [site.name or type(site.module).__name__ for site in sites]

    @contextmanager
    def rows(self, tasks: Sequence[RowTasks], *, equal_sets: bool = False) -> Iterator[None]:
        """Map the rows of the forwards in this block.

        equal_sets: True to give every rank the same sets of tasks, and so the same passes. All
        ranks then enter the block.
        """
        if not torch.is_grad_enabled():
            yield
            return
        leave_graphs()
        sets = sorted(union_over_ranks(set(tasks)) if equal_sets else set(tasks))
        if any(len(row) > 1 for row in sets):
            rows: RowMap = SeveralTasks(tasks, sets, len(self._tasks), self._device, self._parameter)
        else:
            numbers = [row[0] if row else -1 for row in tasks]
            rows = RowMap(numbers, len(self._tasks), self._device, self._parameter)
        with self._position.block(rows), explained():
            yield

    @property
    def active(self) -> bool:
        """True from `begin` to the end of backward."""
        return self.sink is not None and self.sink.active

    @property
    def used(self) -> bool:
        """True if there was a `rows` block since the last backward."""
        return bool(self._position.maps)

    def begin(self, sink: Sink, *, verifying: bool = False) -> None:
        """Let the next forwards pass task gradients to `sink`. verifying: see the class."""
        self.forget()
        self.sink, self.verifying = sink, verifying
        if verifying:  # several backwards follow, and a compiled graph may allow only one
            self._until_end.enter_context(eager())
        sink.ways_out, sink.per_task = _WAYS_OUT + self._per_task, self._per_task
        sink.used = True
        if self._unsharded is not None:
            sink.in_graph = self._unsharded.of

    def forget(self) -> None:
        """Drop all row maps, at the end of backward."""
        self._until_end.close()
        self.sink = None
        self._position.forget()
        self.output_mismatches.clear()

    def passes(self) -> list[list[str]]:
        """Return the tasks of each backward pass that the blocks since the last backward need."""
        sets = [row for found in self._position.maps if isinstance(found, SeveralTasks) for row in found.sets]
        return [[self._tasks[task] for task in tasks] for tasks in passes_of(sets, len(self._tasks))]

    def enter(self, names: Sequence[str]) -> None:
        """Begin the backward pass of the losses of these tasks."""
        for found in self._position.maps:
            if isinstance(found, SeveralTasks):
                found.enter([self._tasks.index(name) for name in names])

    def check_losses(self, rows: Mapping[str, int]) -> None:
        """Raise UserError for a task that has losses, but no row. rows: of each task's loss."""
        for name, number in rows.items():
            if number and not any(found.has_rows(self._tasks.index(name)) for found in self._position.maps):
                raise UserError(f"rows: task {name} has losses of {number} rows, but no row of the batch belongs to it")

    def detach(self) -> None:
        """Give every module the forward that it had before.

        Raises UserError, and changes nothing, if another library has replaced a forward since.
        """
        for name, forward in zip(self._names, self._forwards, strict=True):
            if not forward.in_place:
                raise UserError(
                    f"detach: the forward of module {name} was replaced after GradientSurgery was attached: undo that "
                    "change before"
                )
        for forward in self._forwards:
            forward.restore()
        self._forwards.clear()
        if self._unsharded is not None:
            self._unsharded.remove()

    def _parameter(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """Return the sink's parameter `name` of a module, or the module's own if not shared."""
        found = self._parameters.get((id(module), name))
        return getattr(module, name) if found is None else found

    def _now(self, site: Site) -> RowMap | OneTask | None:
        """Return the map of a site whose forward runs now; None if it runs without surgery."""
        if self.sink is None or not self.sink.active or not torch.is_grad_enabled():
            return None
        if self._position.now is not None:
            return self._position.now
        return self._position.of_backward(site) if self.sink.in_backward else None

    def _run(self, site: Site, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the forward of a site."""
        where = self._now(site)
        if where is None:
            return plain(*args, **kwargs)
        is_trunk = not site.name
        if is_trunk and isinstance(where, RowMap):
            where.check_inputs([x for x in tensors_in((args, dict(kwargs))) if x.dim()])
        try:
            output = self._ruled(site, where, plain, args, kwargs)
        except Unsupported as reason:
            raise UnsupportedModule(site.name or "model", site.module, reason, self._per_task) from None
        if is_trunk and self._position.now is not None:
            self._position.mark(where, output)
        return output

    def _ruled(
        self,
        site: Site,
        where: RowMap | OneTask,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the forward of a site during surgery, in the way that its parameters need."""
        sink = self.sink
        assert sink is not None
        if self._unsharded is not None:
            self._unsharded.check(site.name or "model", site.module, site.own)
        if isinstance(where, OneTask) and (where.aliased or site.rule is None):
            with replaced(_aliases_of_task(site, where, sink)):
                return plain(*args, **kwargs)
        x = _only_tensor(args, kwargs)
        if site.rule is not None and site.beneath is None and x is not None and _is_covered(site.rule, where, x):
            return site.rule(site.module, where, sink, x)
        if not (site.own or site.beneath):
            return plain(*args, **kwargs)
        assert isinstance(where, RowMap)
        return self._by_task(site, where, sink, plain, args, kwargs)

    def _by_task(
        self,
        site: Site,
        where: RowMap,
        sink: Sink,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a site once per task; compare its outputs with those of one run, if verifying."""
        if site.beneath is not None and not site.gathered:
            self._let_zero3_gather(site, plain, args, kwargs)
        owned = site.own if site.beneath is None else [item for item in site.beneath if item.available]
        whole = next((names for kind, names in WHOLE.items() if isinstance(site.module, kind)), ())

        def run(task: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, one_row: bool) -> Any:
            inside = where.only(task, aliased=one_row or site.beneath is not None)
            if site.around:  # checkpointing inside it repeats modules of one task in backward
                self._position.mark(where, (args, kwargs))
            kept = nullcontext() if where.groups[task] else keep_buffers(site.module)
            with self._position.inside(inside), kept:
                output = plain(*args, **kwargs)
            if site.around:
                self._position.mark(inside, output)
            return output

        output = run_by_task(run, owned, where, sink, args, kwargs, whole)
        if self.verifying and not sink.in_backward:
            by_task = partial(run_by_task, _as_before(plain), (), where, sink, args, kwargs, whole)
            self._compare_outputs(site, lambda: plain(*args, **kwargs), by_task)
        return output

    def _compare_outputs(self, site: Site, run: Callable[[], Any], by_task: Callable[[], Any]) -> None:
        """Record a sentence if a site's outputs of its runs per task are not those of one run."""
        found = output_mismatch(site.name or "model", site.module, run, by_task, self._device, self._per_task)
        self.output_mismatches += [] if found is None else [found]

    def _let_zero3_gather(
        self, site: Site, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run a module once, so that ZeRO 3 learns which parameters beneath it the module itself
        reads, and from then on gathers these for the module's forward.
        """
        site.gathered = True
        if not all(item.available for item in site.beneath or ()):
            with torch.no_grad(), unchanged(self._device, site.module):
                plain(*args, **kwargs)


def _aliases_of_task(site: Site, where: OneTask, sink: Sink) -> list[tuple[Owned, Tensor]]:
    """Return aliases for the task that runs now, but of parameters that are replaced already."""
    own = [item for item in site.own if sink.wants(item.parameter) and item.name not in item.holder.__dict__]
    return [(item, aliases(item, [where.task], where.task_of, sink)[0]) for item in own]


def _as_before(plain: Callable[..., Any]) -> RunTask:
    """Return a function that runs a module as before surgery: without gradients, all modules do."""
    return lambda task, args, kwargs, *, one_row: plain(*args, **kwargs)


def _is_covered(rule: Rule, where: RowMap | OneTask, x: Tensor) -> bool:
    """Return True if a rule can tell the rows of its input x."""
    if not x.dim():
        return False
    one_row = len(x) == 1 and where.batch != 1
    return rule is embedding_rule if one_row else where.fits(len(x))


def _only_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the only argument if it is a tensor."""
    given = [*args, *kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None
