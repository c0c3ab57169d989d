"""Check of one pass against a pass per task: its steps, tolerance, error and log line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastmtl.errors import UserError, listed, quoted
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.ranks.collectives import gather_over_ranks, max_over_ranks, world_size
from fastmtl.surgery.stopwatch import Stopwatch
from fastmtl.surgery.verify.comparison import Comparison
from fastmtl_kernels.upload import upload

log = logging.getLogger(__name__)

_NAMED = 5  # parameters in a message
_TOLERANCE, _NARROW_TOLERANCE = 1e-5, 2e-2


class Verifier:
    """Check of the task gradients in the first step, and in every n-th if `every` is n, not None.

    shared: the parameters that are compared. names: of them, by id. per_task: of the target, for
    the message.
    """

    def __init__(
        self,
        every: int | None,
        shared: Sequence[nn.Parameter],
        tasks: Sequence[str],
        names: Mapping[int, str],
        device: torch.device,
        per_task: str = PER_TASK_PASSES,
    ) -> None:
        self.shared, self._per_task = list(shared), per_task
        self._every, self._tasks, self._device = every, list(tasks), device
        self._names = [names[id(parameter)] for parameter in shared]
        self._steps, self._pending, self._logged = 0, True, False

    @property
    def due(self) -> bool:
        """True if the next step is to be checked.

        A step that could not be compared, since its gradients were not finite, leaves that to the
        next one.
        """
        return self._pending or (self._every is not None and self._steps % self._every == 0)

    def next_step(self) -> bool:
        """Begin a step; return True if it is to be checked."""
        self._pending = self.due
        self._steps += 1
        return self._pending

    def settle(self, compare: Callable[[], Comparison], output_mismatches: Sequence[str] = ()) -> None:
        """Compare and decide, together with the other ranks, that the task gradients are right.

        Nothing is decided if a gradient of any rank is not finite.

        output_mismatches: sentences about modules whose runs per task differ from one run.
        Raises UserError on every rank if any rank has a difference.
        """
        watch = Stopwatch(self._device)
        found = compare()
        watch.stop()
        relative = found.relative()
        finite = torch.isfinite(relative)
        narrow = found.narrow or _computes_narrow(self.shared, self._device)
        flags = upload(torch.tensor([narrow, len(output_mismatches)], dtype=torch.float64), relative.device)
        packed = torch.cat([relative.where(finite, 0).flatten(), (~finite.all()).double()[None], flags])
        *numbers, not_finite, narrow_anywhere, mismatches = max_over_ranks(packed).tolist()
        if not_finite:
            return
        tolerance = _NARROW_TOLERANCE if narrow_anywhere else _TOLERANCE
        largest = max(numbers, default=0.0)
        lines = (
            [_of_parameters(numbers, self._names, self._tasks, tolerance, found.other_cause, self._per_task)]
            if largest > tolerance
            else []
        )
        if mismatches:
            lines += _from_all_ranks(output_mismatches)
        if lines:
            raise UserError(*lines)
        self._pending = False
        if not self._logged and not (world_size() > 1 and dist.get_rank()):
            log.info(
                "compared the task gradients of %d parameters with %d passes: largest difference %.1g of a norm, "
                "tolerance %g; this step took %.2f s longer; verify_every=0 turns it off",
                len(self._names),
                len(self._tasks),
                largest,
                tolerance,
                watch.seconds(),
            )
        self._logged = True


def _computes_narrow(shared: Sequence[nn.Parameter], device: torch.device) -> bool:
    """Return True if parameters have 16 bits, or if products of float32 numbers may be rounded."""
    backends: Any = torch.backends  # whose stubs lack some of these settings
    of_cuda = device.type == "cuda"
    matmul = backends.cuda.matmul if of_cuda else backends.mkldnn.matmul
    conv = backends.cudnn.conv if of_cuda else backends.mkldnn.conv
    # TF32 is the default of convolutions on a GPU; their weights have three dimensions or more.
    convolves = any(len(whole_shape(parameter)) > 2 for parameter in shared)
    precisions = {matmul.fp32_precision, *([conv.fp32_precision] if convolves else [])}
    return bool(precisions & {"tf32", "bf16"}) or any(parameter.dtype.itemsize < 4 for parameter in shared)


def _of_parameters(
    relative: Sequence[float],
    names: Sequence[str],
    tasks: Sequence[str],
    tolerance: float,
    other_cause: str,
    per_task: str,
) -> str:
    """Return the sentence about parameters with a difference. relative: [n * T]."""
    rows = [relative[start : start + len(tasks)] for start in range(0, len(relative), len(tasks))]
    wrong = [(row, name) for row, name in zip(rows, names, strict=True) if max(row) > tolerance]
    wrong.sort(key=lambda pair: -max(pair[0]))
    named = [
        f"{quoted(name)} (difference {max(row):.1g} of its norm, tasks "
        f"{listed(task for task, value in zip(tasks, row, strict=True) if value > tolerance)})"
        for row, name in wrong[:_NAMED]
    ]
    more = f" and {len(wrong) - _NAMED} more parameters" if len(wrong) > _NAMED else ""
    return (
        f"one pass gives other task gradients than a pass per task for {', '.join(named)}{more}: rows of different "
        "tasks mix (BatchNorm in training, attention across the batch, in-batch negatives), a tensor's first "
        f"dimension only looks like rows, or {other_cause}; leave these parameters out of `shared` (their gradient is "
        f"then the plain sum), name the module in per_task_modules=[...], or use {per_task}"
    )


def _from_all_ranks(sentences: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(sentence for of_rank in gather_over_ranks(list(sentences)) for sentence in of_rank))
