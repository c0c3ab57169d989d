"""The tracker, which records a run on the terminal, in metrics.jsonl and in other libraries."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from fastmtl.config import Recipe
from fastmtl.errors import one_line
from fastmtl.tracking.backends import Backend, open_backend
from fastmtl.tracking.backends.backend import flat
from fastmtl.tracking.display import LastingConsole, open_display, scores_table, summarize
from fastmtl.tracking.metrics_file import MetricsFile

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_WRITES = 1.0


class StepInfo(Protocol):
    """The fields of the result of `GradientSurgery.run` that are tracked.

    T: the number of tasks, which are in the recipe's order.
    """

    @property
    def losses(self) -> Mapping[str, float | Tensor]:
        """Mean loss of every task with rows in the step."""

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the tasks' shared gradients, float [T, T].

        NaN for an absent task; None if not computed.
        """

    @property
    def conflict_rate(self) -> float | Tensor | None:
        """Share of task pairs with a negative cosine, None if not computed."""

    @property
    def task_norms(self) -> Any:
        """Norm of each task's gradient: a mapping by task, or T numbers, or None."""

    @property
    def merged_norm(self) -> float | None:
        """Norm of the merged gradient of the shared parameters, None if not computed."""

    @property
    def skipped(self) -> str | None:
        """Name of the non-finite gradient that made the step skip its update, else None."""

    @property
    def seconds(self) -> float:
        """Time that surgery added to the step; reading it may wait for the device."""

    @property
    def nbytes(self) -> int:
        """Bytes of J (the stored task gradients), or of the buffers that replace it."""


@dataclass(frozen=True)
class _Logged:
    """A step whose line is not written yet.

    lr: one learning rate, or one per parameter group. time: Unix seconds.
    """

    step: int
    epoch: int
    info: StepInfo
    lr: float | Mapping[str, float]
    tokens_per_second: float
    time: float


class Tracker:
    """Progress, metrics.jsonl and the libraries of `tracking`.

    Without `is_main` all methods do nothing.

    Reading a step's values waits until the device has done the step. So the lines of logged steps
    (`train.log_every`) are read and written together, about once per second. `flush` writes the
    rest; a killed run loses the lines of its last second.

    When a run resumes from `resume_step`, lines of later steps are removed, so that metrics.jsonl
    equals that of an uninterrupted run. within_epoch: the run ended within an epoch at resume_step;
    its evaluation there is removed too, since an uninterrupted run makes none.

    Fields of a step in metrics.jsonl: step, phase (its name, in a run of several), epoch (from 0,
    in the phase), loss {task: mean}, lr, cosines {"a/b": cosine}, conflict_rate, task_norms {task:
    norm}, merged_norm, skipped (name of the non-finite gradient, or null), surgery_bytes and
    surgery_seconds (of this step), tokens_per_second (over the steps since the last line, without
    evaluation), time (Unix seconds). Fields of an evaluation: step, phase, epoch, dev {task:
    {metric: value}}, mean, time. Non-finite numbers are null.
    """

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        total_steps: int,
        resume_step: int = 0,
        *,
        within_epoch: bool = False,
        is_main: bool = True,
        console: Console | None = None,
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._recipe = self._part = recipe
        self._phase: str | None = None
        self._total_steps = total_steps
        output.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(output / "metrics.jsonl", resume_step, within_epoch=within_epoch)
        self._console = console or LastingConsole()
        self._backends: dict[str, Backend] = {
            name: open_backend(name, output, recipe, resume_step) for name in recipe.tracking
        }
        self._display = open_display(self._console, total_steps, resume_step)
        self._waiting: list[_Logged] = []
        self._written = 0.0
        self._restart_clock()

    def begin_phase(self, name: str, recipe: Recipe) -> None:
        """Start a phase: print its name and tasks, and add its name to the following lines.

        recipe: that of the phase.
        """
        self.flush()
        if self._is_main:
            self._phase, self._part = name, recipe
            self._display.message(f"phase {name}: {', '.join(recipe.task_names)}")

    def step(self, step: int, epoch: int, info: StepInfo, lr: float | Mapping[str, float], tokens: int) -> None:
        """Record optimiser step `step` (from 1) of `epoch` (from 0).

        tokens: the tokens of this step over all ranks.
        """
        if not self._is_main:
            return
        self._tokens += tokens
        if step % self._part.train.log_every == 0 or step == self._total_steps:
            now = time.monotonic()
            rate = self._tokens / max(now - self._since, 1e-9)
            self._waiting.append(_Logged(step, epoch, info, lr, rate, time.time()))
            self._restart_clock()
            if now - self._written >= SECONDS_BETWEEN_WRITES or step == self._total_steps:
                self.flush()
                return
        self._display.update(step, epoch, None)

    def flush(self) -> None:
        """Write the lines of all logged steps that are not written yet."""
        if not self._is_main:
            return
        waiting, self._waiting = self._waiting, []
        for logged in waiting:
            summary = self._log(logged)
            self._display.update(logged.step, logged.epoch, summary)
        self._written = time.monotonic()

    def _log(self, logged: _Logged) -> str:
        step, info, lr = logged.step, logged.info, logged.lr
        losses = {name: float(loss) for name, loss in info.losses.items()}
        conflict_rate = None if info.conflict_rate is None else float(info.conflict_rate)
        line = {
            "step": step,
            **self._where(),
            "epoch": logged.epoch,
            "loss": losses,
            "lr": dict(lr) if isinstance(lr, Mapping) else lr,
            "cosines": self._pairwise(info.cosines),
            "conflict_rate": conflict_rate,
            "task_norms": self._by_task(info.task_norms),
            "merged_norm": info.merged_norm,
            "skipped": info.skipped,
            "surgery_bytes": info.nbytes,
            "surgery_seconds": round(info.seconds, 6),
            "tokens_per_second": round(logged.tokens_per_second, 1),
            "time": round(logged.time, 3),
        }
        self._file.write(line)
        self._send(step, {key: line[key] for key in line if key not in ("step", "phase", "epoch", "time")})
        return summarize(losses, conflict_rate, logged.tokens_per_second)

    def evaluation(self, step: int, epoch: int, dev: dict[str, dict[str, float]], mean: float) -> None:
        """Record the metrics on the dev rows after optimiser step `step`.

        dev: {task: {metric: value}}. mean: the mean over tasks of each task's own metric. A resumed
        run may repeat an evaluation; a line that the file already has is not written again.
        """
        if not self._is_main:
            return
        self.flush()
        if step > self._file.last_evaluation:
            line = {
                "step": step,
                **self._where(),
                "epoch": epoch,
                "dev": dev,
                "mean": mean,
                "time": round(time.time(), 3),
            }
            self._file.write(line)
            self._file.last_evaluation = step
            self._send(step, {"dev": {**dev, "mean": mean}})
        chosen = [f"{task} {self._recipe.tasks[task].metric_name} {self._chosen(task, dev):.3f}" for task in dev]
        self._display.message(f"epoch {epoch + 1}  step {step}  dev: {'  '.join(chosen)}  mean {mean:.3f}")
        self._restart_clock()

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._is_main:
            self._display.message(text)

    def scores(self, dev: dict[str, dict[str, float]], mean: float, title: str = "dev scores") -> None:
        """End the progress bar and print a table of the final scores.

        dev, mean: as for `evaluation`.
        """
        if self._is_main:
            self.flush()
            self._display.close()
            self._console.print(scores_table(self._recipe, dev, mean, title))

    def close(self) -> None:
        """Flush and close everything; the tracker cannot be used afterwards."""
        self.flush()
        if self._is_main:
            self._display.close()
            self._file.close()
            for name in list(self._backends):
                self._guarded(name, lambda backend: backend.close())

    def _restart_clock(self) -> None:
        self._tokens, self._since = 0, time.monotonic()

    def _chosen(self, task: str, dev: dict[str, dict[str, float]]) -> float:
        return dev[task][self._recipe.tasks[task].metric_name]

    def _where(self) -> dict[str, str]:
        return {} if self._phase is None else {"phase": self._phase}

    def _pairwise(self, cosines: Tensor | None) -> dict[str, float]:
        if cosines is None:
            return {}
        names, values = self._part.task_names, cosines.tolist()
        pairs = itertools.combinations(range(len(names)), 2)
        return {f"{names[i]}/{names[j]}": values[i][j] for i, j in pairs}

    def _by_task(self, values: Mapping[str, Any] | Iterable[Any] | None) -> dict[str, float]:
        if values is None:
            return {}
        items = values if isinstance(values, Mapping) else dict(zip(self._part.task_names, values, strict=True))
        return {name: float(value) for name, value in items.items()}

    def _send(self, step: int, line: Mapping[str, Any]) -> None:
        """Send the numbers of a line to the libraries of `tracking`."""
        numbers = {name: value for name, value in flat(line).items() if isinstance(value, (int, float))}
        for name in list(self._backends):
            self._guarded(name, lambda backend: backend.log(step, numbers))

    def _guarded(self, name: str, call: Callable[[Backend], None]) -> None:
        """Call a library. After an error the run goes on without it; metrics.jsonl has it all."""
        try:
            call(self._backends[name])
        except Exception as error:  # the libraries raise exceptions of many kinds
            del self._backends[name]
            self._display.message(f"tracking: {name} failed and is left out from here on: {one_line(str(error))}")
