"""Gradient surgery for a training loop. A step itself is in steps/: stacked.py, joint.py, ...

Row t of J [T, P] is the gradient of task t's loss with respect to the P shared numbers. The Gramian
G = J J^T [T, T] has the inner products of the task gradients. The loss of task t is weight_t * (sum
of its rows' losses) / (number of its rows) over all micro-batches and ranks of a step, so it does
not depend on how the rows are distributed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from fastmtl.surgery import checks
from fastmtl.surgery.attach.attachment import Attachment
from fastmtl.surgery.balance import Balance, RiskWeights
from fastmtl.surgery.checks import Passes, Reduce, Scope, Storage
from fastmtl.surgery.clipping import check_max_norm
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.methods.method import Reduction
from fastmtl.surgery.methods.table import find_method
from fastmtl.surgery.parameters import check_sharded, choose_parameters
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.sinks.layer_gramians import LayerWatcher
from fastmtl.surgery.sinks.make import make_sink
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.source import GramianSource
from fastmtl.surgery.solver import Solver
from fastmtl.surgery.steps.runner import Settings, StepRunner
from fastmtl.surgery.steps.stacked import RecordMerging
from fastmtl.surgery.targets.find import find_target
from fastmtl.surgery.verify.verifier import Verifier

log = logging.getLogger(__name__)


class GradientSurgery:
    """Gradient surgery, or a plain sum of losses, on a DeepSpeed engine or a torch optimizer.

        surgery = GradientSurgery(engine, "pcgrad", tasks=["kind", "degree"], model=trunk)
        with surgery.rows(batch["task"]):
            losses = losses_of(trunk(batch["ids"]))  # {task: (sum of its rows' losses, rows)}
        info = surgery.backward(losses)
        if info.skipped is None:
            engine.step()

    One row of J [T, P] per task is the task's gradient of the P shared numbers. In each step, the
    method turns the Gramian G = J J^T into one weight per task. The weighted sum of task gradients
    becomes the gradient of the shared parameters; all other parameters get their ordinary gradient.
    docs/surgery.md has complete scripts.

    Args:
        target: DeepSpeed engine (ZeRO 0 to 3), or a torch optimizer. With several processes and an
            optimizer, surgery sums the gradients over the ranks and adds the sums to `.grad`.
        method: "sum", "pcgrad", "gradvac", "equal", or a Gramian weighting of TorchJD in lower case
            ("upgrad", "mgda", ...). "sum" adds the losses and ignores `storage`, `scope`, `reduce`
            and `dtype`. "equal" gives the same sum, but also cosines, norms and `diagnose`.
        tasks: names of the T tasks, in the order of the rows of J; `rows` numbers them from 0.
        model: the trunk, the part of the network that all tasks share, of any architecture. One
            backward pass then gives all task gradients. Run its forward inside `rows`. Without
            `model`, each task has a backward pass of its own, except for models whose layers take
            `task_grads` (fastmtl.surgery.functional).
        shared: parameters whose task gradients are merged; default: all that `model` or else the
            target trains. After freezing or unfreezing a parameter, create a new GradientSurgery.
        sparse: shared embedding tables [V, d] whose gradients are kept only for the rows in use;
            default: the tables of `model` with more than 2048 rows that only an nn.Embedding uses.
        per_task_modules: modules of `model` that run as a whole once per task, because they use
            parameters in tensors without rows, such as tables of relative positions: classes, names
            of classes, modules, or their names. Known classes need no entry.
        passes: "one" backward pass for all tasks, or "per_task": T backward passes, for any model;
            `model` stays unchanged, and `rows` has no effect.
        verify_every: compare task gradients with those of T passes in the first step (None), in the
            first and every n-th step (n), or never (0). A difference, such as from BatchNorm, is an
            error. Without `model`, None means never.
        storage: "stacked" stores J. "kept" stores inputs and output gradients of the layers and
            multiplies them for G and for merging. "replay" keeps only G and runs forward and
            backward twice. "auto" is "stacked" where supported (ZeRO 0 to 2 without offload), else
            "replay".
        scope: "global", or "tensor": find weights and merge for each parameter tensor separately,
            in the backward of each micro-batch. The result differs from "global". It needs neither
            J nor a second pass, in any ZeRO stage.
        reduce: "exact": J is the sum over all ranks. "local": each rank merges its own J, then the
            ranks average. "sketch": G is estimated from count-sketches of J; ranks exchange only
            the sketches and the merged gradient.
        dtype: dtype of J for "stacked". torch.bfloat16 halves J's memory; 8 significant bits stay.
        sketch_size: buckets per task for "sketch", at least 16. The root-mean-square error of a
            cosine is at most sqrt(2 / sketch_size).
        task_weights: fixed factor of each task's loss, applied before G is computed; default: 1.
        reduction: "sum" (as in the papers) or "mean" of pcgrad's and gradvac's modified gradients.
        options: keyword arguments of the method, for example {"c": 0.4} for "cagrad".
        seed: the random projection order of a step is drawn from the seed and the step's number.
        cuda_graphs: fastmtl.cuda_graphs.record_merging, to run Gramian, weights and merging as one
            CUDA graph; the log and `not_recorded` give the reasons where this is not possible.
        max_norm: bound of the norm of the gradient of all trained parameters together. G gives the
            norm, so the engine's `gradient_clipping` can be 0 and its gradient checks off. math.inf
            only measures. None leaves clipping to the target. "sum" under DeepSpeed needs a single
            process for it.
        balance: weights of the tasks that follow their excess risks, such as
            fastmtl.model.losses.weighting.ExcessMTL(len(tasks)). They multiply the task gradients
            before the method sees them; parameters of one task keep their own gradient. Takes
            T x P float32 numbers, divided among the ranks; storage "replay" then also keeps J.

    Raises:
        UserError: an unknown name; an unsupported combination, with the nearest supported one.
    """

    def __init__(
        self,
        target: Any,
        method: str = "pcgrad",
        *,
        tasks: Sequence[str],
        model: nn.Module | None = None,
        shared: Iterable[nn.Parameter] | None = None,
        sparse: Iterable[nn.Parameter] | None = None,
        per_task_modules: Sequence[type[nn.Module] | str | nn.Module] = (),
        passes: Passes = "one",
        verify_every: int | None = None,
        storage: Storage = "auto",
        scope: Scope = "global",
        reduce: Reduce = "exact",
        dtype: torch.dtype = torch.float32,
        sketch_size: int = checks.SKETCH_SIZE,
        task_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "sum",
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        cuda_graphs: RecordMerging | Literal[False] = False,
        max_norm: float | None = None,
        balance: RiskWeights | None = None,
    ) -> None:
        self._target = find_target(target)
        chosen = find_method(method, reduction, options)
        self.tasks = checks.check_tasks(tasks)
        weights = checks.check_task_weights(task_weights or {}, self.tasks)
        checks.check_model(model, passes, per_task_modules, verify_every)
        attaches = model is not None and passes == "one" and chosen is not None
        if model is not None:
            self._target.learn_names(model)
        merged, tables = choose_parameters(self._target, model, shared, sparse, attaches=attaches)
        if chosen is not None:
            check_sharded(self._target, merged, model, passes)
        if not merged and chosen is not None:
            log.warning("no shared parameter is trained, so no task gradients can conflict: falling back to sum")
            chosen = None
        self.storage = checks.check_options(
            self._target.stacks,
            chosen,
            storage=storage,
            scope=scope,
            reduce=reduce,
            dtype=dtype,
            sketch_size=sketch_size,
        )
        check_max_norm(max_norm, self._target, self.storage, reduce, joint=chosen is None)
        if reduce == "sketch":
            checks.check_sketch(sketch_size, tables)
        mode = "tensor" if scope == "tensor" and chosen is not None else self.storage
        self._sink = make_sink(
            mode, merged, len(self.tasks), sparse=tables, dtype=dtype, reduce=reduce, sketch_size=sketch_size
        )
        self._sink.per_task, device = self._target.per_task, self._target.device
        attached: Attachment | None = None
        if model is not None and attaches and merged:
            attached = Attachment(model, merged, self.tasks, device, per_task_modules, self._target.per_task)
        verifier: Verifier | None = None
        if chosen is not None and (verify_every if attached is None else verify_every != 0):
            names = self._target.names
            verifier = Verifier(verify_every, merged, self.tasks, names, device, self._target.per_task)
        ids = {id(parameter) for parameter in merged}
        own = [parameter for parameter in self._target.parameters if id(parameter) not in ids]
        weighing: Balance | None = None
        if balance is not None:
            checks.check_balance(method, self.storage, scope, reduce)
            if chosen is not None and isinstance(self._sink, GramianSource):
                weighing = self._sink.balance = Balance(balance, merged, len(self.tasks))
        solver = Solver(chosen, method, self.tasks, seed, by_rank=reduce == "local", balance=weighing)
        parts = Parts(self._target, solver, self.tasks, merged, own, max_norm, attached, verifier)
        settings = Settings(
            model=model,
            task_weights=weights,
            storage=self.storage,
            scope=scope,
            by_rank=reduce == "local",
            joint=chosen is None,
            plain=method == "sum",
            per_task=passes == "per_task",
        )
        self._runner = StepRunner(parts, self._sink, settings)
        checks.check_cuda_graphs(cuda_graphs)
        if cuda_graphs:
            self.record_with(cuda_graphs)

    def run(
        self,
        micro_batches: Sequence[Any],
        loss_fn: Callable[..., Losses | tuple[Losses, Any]],
        counts: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        features: bool = False,
        stop: bool = False,
    ) -> SurgeryInfo:
        """Run forward and backward of one step, and give the target one merged gradient.

        Call `engine.step()` or `optimizer.step()` afterwards, unless the report's `skipped` is set.

        Args:
            micro_batches: the step's micro-batches, at least one; each goes to `loss_fn` unchanged.
            loss_fn: loss_fn(micro_batch, ...) -> {task: (sum of the rows' losses, number of rows)}.
                The sum is a scalar tensor. `loss_fn` may declare two keyword arguments: `model`,
                the engine or its module, depending on the pass (required for replay under
                DeepSpeed); `task_grads`, the sink for layers of fastmtl.surgery.functional. With
                GradientSurgery(model=...), it runs the forward inside `rows`.
            counts: rows of each task in the whole step over all ranks; required with several
                micro-batches; with one, the rows are counted.
            weights: factor of a task's loss in this step, times `task_weights`; equal on all ranks.
            features: True if `loss_fn` returns (losses, features); see `backward`.
            stop: request the end of training after this step, for example after a signal. The flag
                is reduced with the losses: `info.stop` is True if any rank requests it.

        Returns:
            The report of the step, over all ranks.

        Raises:
            UserError: losses that are not scalar sums of rows, or do not fit `tasks` or `counts`; a
                shared parameter whose gradient bypasses the sink or is sparse; re-entrant
                checkpointing; a parameter that was frozen or unfrozen since construction.
            TrainingError: five skipped steps in a row; a loss ("sum") or gradient (scope "tensor")
                that is not finite and has reached the target, so the step cannot be skipped.
        """
        return self._runner.run(micro_batches, loss_fn, counts, weights, features=features, stop=stop)

    @contextmanager
    def rows(self, tasks: Any) -> Iterator[None]:
        """Give the task of each row for the forwards of `model` in this block.

        A row is an element of the first dimension [B, ...] of the model's inputs. The task's loss
        may depend on its own rows only. Several blocks before one `backward` add up, for example
        one for each task. Without gradients (torch.no_grad) the block has no effect.

        Args:
            tasks: int64 [B], the position of each row's task in the argument `tasks` of
                GradientSurgery, -1 for a row of no task; or B names of tasks; or
                {task: number of rows}, in the order of the rows. Rows may have any order; rows
                sorted by task cost no copy, and numbers on the host no wait for the device.
                For rows of several tasks, a tuple of names takes the place of a name; or bool
                [B, T] gives each row's tasks. There is then a backward pass for each set of tasks
                without common rows; storage "replay" repeats the forward, too.

        Raises:
            UserError: an unknown task; no `model`; a model whose inputs do not have B rows;
                storage "replay" or scope "tensor" outside the `loss_fn` of `run`; rows of several
                tasks with scope "tensor", or with storage "replay" on several ranks in another form
                than bool [B, T].
        """
        with self._runner.rows(tasks):
            yield

    def backward(
        self,
        losses: Losses,
        counts: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        features: Any = None,
        last: bool = True,
        stop: bool = False,
    ) -> SurgeryInfo | None:
        """Run backward for one micro-batch, in place of `engine.backward(loss)`.

        Delete the losses afterwards: while they exist, `cuda_graphs` cannot capture a forward.

        Args:
            losses: as `loss_fn` of `run` returns them.
            counts, weights, stop: as in `run`; only those of a step's first call are used.
            features: tensor that the trunk has computed and the heads read, or a tuple, list or
                mapping of such tensors. The method then merges the tasks' gradients of `features`
                in place of those of the parameters, and the trunk has one plain backward. The
                forward runs outside of `rows`, without `task_grads`, and in ZeRO 3 through
                `engine(...)` in place of `engine.module`. `storage`, `scope` and `dtype` have no
                effect.
            last: True for the last micro-batch of the step, which also merges the gradient.

        Returns:
            The report of the step for its last micro-batch, None before.

        Raises:
            UserError: as in `run`; without `features`, for storage "replay" and scope "tensor",
                which need `run`; for features that no loss depends on, or that depend on each
                other; in ZeRO 3 for an operation that reads features for several tasks.
            TrainingError: as in `run`.
        """
        return self._runner.backward(losses, counts, weights, features=features, last=last, stop=stop)

    def detach(self) -> None:
        """Undo the changes to `model`, whose modules then have their own forwards again.

        Call it before another GradientSurgery takes the model. Later steps of this object need one
        backward pass per task. Raises UserError, and changes nothing, if another library has
        replaced a forward since.
        """
        self._runner.detach()

    @property
    def task_grads(self) -> Sink:
        """The sink to pass to a model of fastmtl's layers, before its losses go to `backward`.

        Reading it arms the sink until that `backward`. Raises UserError if that is unsupported.
        """
        return self._runner.arm()

    def record_with(self, record: RecordMerging) -> None:
        """Set the argument `cuda_graphs` to `record` after construction."""
        self._runner.record_with(record)

    @property
    def not_recorded(self) -> list[str]:
        """Reasons why steps were not recorded, as in the log; empty without `cuda_graphs`."""
        return list(self._runner.not_recorded)

    @property
    def shared_names(self) -> dict[int, str]:
        """Names of the shared parameters by id.

        They are those in `model` or in the engine. Otherwise a parameter has a number.
        """
        return {id(parameter): self._target.names[id(parameter)] for parameter in self._runner.parts.shared}

    def watch(self, watcher: LayerWatcher | None) -> None:
        """Give the Gramians of layers in later steps to `watcher`; None ends this.

        fastmtl.surgery.diagnose calls it. Raises UserError where no step has the Gramian of whole
        task gradients, and if there is a watcher already.
        """
        self._runner.watch(watcher)

    def kept_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold task gradients now or sums of their squares, and the buffers
        of `cuda_graphs`.
        """
        balance = self._runner.parts.solver.balance
        sums = [] if balance is None else balance.kept_tensors()
        return self._sink.tensors() + self._runner.recorded_tensors() + sums

    def state_dict(self) -> dict[str, Any]:
        """Return seed, counts of steps and skipped steps, and the method's state, for JSON."""
        return self._runner.parts.solver.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._runner.parts.solver.load_state_dict(state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the part of the state for a checkpoint that is too large for JSON.

        It is the sums of squared task gradients of `balance`, float32 [T, *shape] per shared
        parameter, as "squares.NAME" on the CPU of rank 0; {} on other ranks and without `balance`.
        Every rank must call this method.
        """
        balance = self._runner.parts.solver.balance
        return {} if balance is None else balance.tensors(self.shared_names)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the result of `tensors`, on every rank; the number of ranks may be another one.

        Tensors with other names are ignored.
        """
        balance = self._runner.parts.solver.balance
        if balance is not None:
            balance.load_tensors(tensors, self.shared_names)
