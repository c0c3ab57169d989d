"""Predict the time of a step on many ranks from its parts on a single rank and the cost of links.

Every rank has as many rows as the measured one. With T tasks instead of T0, and W ranks:

    forward, data, the rest   unchanged
    backward                  one more pass over J, which it writes, for each further T0 tasks
    surgery                   passes over J, each half of the time for T0 tasks: the Gramian reads J
                              once, the merge once. `exact`: 1 / W for the Gramian of a rank's
                              columns, 1 for the merge, 2 for the copy into collectives. `local`: 2.
                              `sketch`: 3 for signs and sums, 1 for the merge
    optimiser                 1 / W from ZeRO 1 on
    communication             hand-over unchanged; collectives by `traffic` and `links`. Hidden ones
                              fit into the rest of backward after the first complete piece

Passes are for `storage: stacked`; with other storages all parts stay unchanged. Rows of the
embeddings are left out of the passes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmtl.profile.links import Cluster
from fastmtl.profile.shape import Shape
from fastmtl.profile.traffic import traffic
from fastmtl.surgery.checks import SKETCH_SIZE

WORLDS = tuple(2**k for k in range(11))
TASKS = (2, 4, 8, 16, 32)
ALONE, COPIES, SKETCHING = 2, 2, 3


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a step on one rank.

    seconds: by part, with the names of `fastmtl.profile.trace`. tasks: the step's number of tasks.
    source: where the numbers come from.
    """

    seconds: Mapping[str, float]
    tasks: int
    source: str


@dataclass(frozen=True)
class Predicted:
    """The prediction for one step.

    seconds: the time of the step. waiting: seconds of it spent waiting for collectives. sent: bytes
    that each rank sends.
    """

    seconds: float
    waiting: float
    sent: float


def step(shape: Shape, parts: Parts, cluster: Cluster) -> Predicted:
    known = parts.seconds
    compute = sum(known.values())
    if shape.storage == "stacked" and not shape.joint:
        one_pass, more = known["surgery"] / ALONE, shape.tasks / parts.tasks
        compute += one_pass * (more - 1) + one_pass * more * passes(shape) - known["surgery"]
    if shape.zero:
        compute -= known["optimiser"] * (1 - 1 / shape.world)
    collectives = traffic(shape)
    seconds = [one.seconds(cluster, shape.world) for one in collectives]
    hidden = sum(one.hidden * each for one, each in zip(collectives, seconds, strict=True))
    waiting = sum(seconds) - min(hidden, known["backward"] * max((one.hidden for one in collectives), default=0.0))
    return Predicted(compute + waiting, waiting, sum(one.sent(shape.world) for one in collectives))


def passes(shape: Shape) -> float:
    """Return the number of passes over J in surgery, by the table above."""
    if shape.world == 1 or shape.reduce == "local":
        return ALONE
    return 1 + (SKETCHING if shape.sketch_size is not None else COPIES + 1 / shape.world)


def ways(shape: Shape, method: str) -> dict[str, Shape]:
    """Return a shape for each value of `reduce` that the method allows, by that value.

    If gradients are summed, the only name is "sum".
    """
    if shape.joint:
        return {"sum": shape}
    found = {"exact": dataclasses.replace(shape, reduce="exact", sketch_size=None)}
    if method == "pcgrad":
        found["local"] = dataclasses.replace(shape, reduce="local", sketch_size=None)
    if shape.scope == "global":
        size = shape.sketch_size or SKETCH_SIZE
        found["sketch"] = dataclasses.replace(shape, reduce="sketch", sketch_size=size)
    return found


def scale_out(shape: Shape, method: str, parts: Parts, cluster: Cluster) -> dict[str, Any]:
    """Return predictions for every `reduce`, number of tasks and number of ranks, JSON-ready.

    The recipe's number of tasks is included.
    """
    points = []
    for name, way in ways(shape, method).items():
        for tasks, world in itertools.product(sorted({*TASKS, shape.tasks}), WORLDS):
            predicted = step(_at(way, tasks, world), parts, cluster)
            points.append({"reduce": name, "tasks": tasks, "ranks": world, **dataclasses.asdict(predicted)})
    return {
        "tasks": shape.tasks,
        "parts": dict(parts.seconds),
        "source": parts.source,
        "link": dataclasses.asdict(cluster),
        "points": points,
    }


def _at(shape: Shape, tasks: int, world: int) -> Shape:
    """Return the shape with other numbers of tasks and ranks.

    Each task has as many parameters as before. A DeepSpeed bucket that holds all gradients still
    does.
    """
    more = shape.own * tasks // shape.tasks - shape.own
    groups = (*shape.groups[:-1], shape.groups[-1] + more)
    bucket = shape.bucket if shape.bucket < shape.trained else shape.bucket + max(0, more)
    spread = shape.spread(shape.zero, world)
    return dataclasses.replace(spread, tasks=tasks, own=shape.own + more, groups=groups, bucket=bucket)
