"""A backward pass per task, compared with the one pass, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fastmtl.surgery.differentiate import Term, differentiate
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.source import MergingSink
from fastmtl.surgery.verify.comparison import Comparison, compare_dense, compare_table
from fastmtl.surgery.verify.probe import ProbeSink
from fastmtl.surgery.verify.unchanged import unchanged


def compare_backwards(
    sink: MergingSink, passes: Sequence[Sequence[Term]], shared: Sequence[nn.Parameter], names: Mapping[int, str]
) -> Comparison:
    """Compare the task gradients in `sink` with those of T backwards through the same graph.

    Call it after the first backward since `clear`, which has retained the graph. Beside J there is
    one task's gradient at a time.

    passes: for each task, the terms of its loss; terms of other tasks have the factor 0, so that
    each backward takes the same way. Only autograd keeps them apart.
    """
    narrow, tasks, zero = False, [], torch.zeros((), device=sink.anchor.device)
    with unchanged(sink.anchor.device):
        for task, terms in enumerate(passes):
            with sink.totals() as dtypes:
                gradients = differentiate(terms, shared, names, retain_graph=task + 1 < len(passes))
            norms = []
            for parameter, gradient in zip(shared, gradients, strict=True):
                if sink.is_sparse(parameter):
                    norms.append(compare_table(sink.task_rows(parameter, task), gradient, zero))
                    continue
                found = sink.task_gradient(parameter, task)
                if found is not None:
                    dtypes.add(found.dtype)
                norms.append(compare_dense(found, gradient, zero))
            del gradients, gradient
            tasks.append(norms)
            narrow = narrow or any(dtype.itemsize < 4 for dtype in dtypes)
    cause = "an operation changes its saved tensors in backward, as some fused losses do (then use verify_every=0)"
    return Comparison.of_norms(tasks, narrow, cause)


def compare_forwards(
    run: Callable[[Sink, int | None, int], tuple[Sequence[Term], int]],
    num_tasks: int,
    shared: Sequence[nn.Parameter],
    names: Mapping[int, str],
    device: torch.device,
) -> Comparison:
    """Compare random projections of the task gradients of one pass with those of T passes.

    Every pass runs forward again, with equal random numbers: ZeRO 3 allows one backward for each.

    run(sink, task, number): runs the forward with this sink, and returns the terms of its losses;
    those of other tasks have the factor 0. None stands for the tasks of pass `number`: there are
    several if rows have several tasks. Returns their number, too.
    """
    probe = ProbeSink(shared, num_tasks)
    with unchanged(device) as state:

        def project(task: int | None, number: int) -> int:
            state.restore()
            probe.task = task
            with probe.armed(device):
                terms, passes = run(probe, task, number)
                probe.forward_done()
                probe.backward(terms, shared, (), names)
            return passes

        for number in range(1, project(None, 0)):
            project(None, number)
        for task in range(num_tasks):
            project(task, 0)
    return probe.comparison()
