"""The messages between the ranks of a training step, collective by collective.

T tasks, P numbers in the dense shared parameters, V trained numbers in all, of e bytes, W ranks; u
rows of the word embeddings, d wide, occur for a task.

    J, reduce: exact     reduce-scatter of T P numbers, at most 2^23 of them in a collective;
                         all-gathers of u rows
    J, reduce: sketch    all-reduce of T m numbers, m buckets
    J, reduce: local     nothing
    ZeRO 0               all-reduce of V e bytes of gradients
    ZeRO 1, 2            the same, and all-gathers of V e bytes of weights; gradients once in
                         ZeRO 1, in ZeRO 2 with every backward of DeepSpeed
    ZeRO 3               reduce-scatter of V e bytes with every backward; all-gathers of tensors of
                         over 100,000 numbers with every forward (an upper bound: some are still
                         there), of smaller ones once
    small ones           the Gramian, losses, norms, flags

Overlap with computation: J's columns are sent while backward computes the layers below (`stacked`),
or while it waits (`replay`, `scope: tensor`), or after it (`kept`). On GPUs, gradients of
DeepSpeed's own backward are sent while it computes if they fill more than one bucket; but fastmtl's
bucket holds all of them unless the recipe says otherwise. The last piece or bucket is complete when
backward ends. Merged gradients are sent all at once.

Sources: fastmtl/surgery/ranks/collectives.py, sinks/early_scatter.py;
deepspeed/runtime/zero/stage_1_and_2.py (`average_tensor` reduces to all ranks), stage3.py,
engine.py of DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastmtl.profile.deepspeed import FLOAT
from fastmtl.profile.links import Cluster, Kind, sent
from fastmtl.profile.shape import Shape
from fastmtl.surgery.ranks.collectives import BUCKET

INT64, DOUBLE = 8, 8
# DeepSpeed's constants: a group's partition is a multiple of ALIGNMENT numbers per rank; ZeRO 3
# keeps tensors below PERSISTENT whole.
ALIGNMENT, PERSISTENT = 2, 100_000


@dataclass(frozen=True)
class Collective:
    """`times` equal collectives.

    nbytes: the buffer of one collective, all ranks' parts together. hidden: the share of the
    collectives that runs while backward computes.
    """

    what: str
    kind: Kind
    nbytes: int
    times: int = 1
    hidden: float = 0.0

    def sent(self, world: int) -> float:
        """Return the bytes that each rank sends."""
        return self.times * sent(self.kind, self.nbytes, world)

    def seconds(self, cluster: Cluster, world: int) -> float:
        return self.times * cluster.seconds(self.kind, self.nbytes, world)


def traffic(shape: Shape) -> list[Collective]:
    """Return the collectives of one optimiser step; none for one rank."""
    if shape.world == 1:
        return []
    return [*_surgery(shape), *_gradients(shape), *_weights(shape), *_small(shape)]


def _surgery(shape: Shape) -> Iterator[Collective]:
    if shape.joint or shape.reduce == "local":
        return
    if shape.sketch_size is not None:
        yield Collective("sketches", "all_reduce", shape.tasks * shape.sketch_size * FLOAT)
        return
    scatter: Kind = "reduce_scatter" if shape.on_gpu else "all_reduce"  # gloo's reduce-scatter is an all-reduce inside
    if shape.storage == "stacked":
        pieces, passes = [(shape.dense, shape.j_bytes)], 1
    elif shape.storage == "kept":  # in float32, all vectors together
        vectors = [size for size in shape.sizes if size <= shape.intermediate]
        pieces = [(size, FLOAT) for size in shape.sizes if size > shape.intermediate] + [(sum(vectors), FLOAT)]
        passes = 1
    else:
        # The sums of rows of small tables are float32, products have the weights' type.
        tables = {shape.positions * shape.embedding, shape.types * shape.embedding}
        pieces = [(size, FLOAT if size in tables else shape.number_bytes) for size in shape.sizes]
        passes = shape.accumulation
    found = _pieces(shape, pieces)
    hidden = 1 - 1 / sum(found.values()) if shape.storage == "stacked" else 0.0
    for nbytes, times in found.items():
        yield Collective("columns of J", scatter, nbytes, times * passes, hidden)
    if shape.table and shape.storage != "none":
        rows = sum(load.unique for load in shape.loads) * shape.world
        yield Collective("rows' ids", "all_gather", rows * INT64)
        yield Collective("rows of J", "all_gather", rows * shape.embedding * FLOAT)


def _pieces(shape: Shape, pieces: list[tuple[int, int]]) -> dict[int, int]:
    """Split (columns, bytes per number) pairs into collectives.

    Return {bytes of a collective of all tasks, padded: number of such collectives}.
    """
    world, tasks = shape.world, shape.tasks
    most = max(1, BUCKET // (world * tasks)) * world
    found: dict[int, int] = {}
    for columns, number_bytes in pieces:
        whole, rest = divmod(columns, most)
        for size, times in ((most, whole), (rest, int(rest > 0))):
            if times:
                nbytes = -(-size // world) * world * tasks * number_bytes
                found[nbytes] = found.get(nbytes, 0) + times
    return found


def _gradients(shape: Shape) -> Iterator[Collective]:
    joined = shape.joint or shape.storage not in ("stacked", "kept")  # made by DeepSpeed's own backwards
    backwards = shape.accumulation if joined and shape.zero >= 2 else 1
    nbytes = shape.trained * shape.number_bytes
    kind: Kind = "reduce_scatter" if shape.zero == 3 else "all_reduce"
    buckets = -(-shape.trained // shape.bucket)
    hidden = 1 - 1 / buckets if shape.overlap and joined else 0.0
    yield Collective("gradients", kind, nbytes // buckets, backwards * buckets, hidden)


def _weights(shape: Shape) -> Iterator[Collective]:
    if shape.zero in (1, 2):
        step = ALIGNMENT * shape.world
        for group in shape.groups:
            yield Collective("weights", "all_gather", -(-group // step) * step * shape.number_bytes)
    if shape.zero == 3:
        passes = shape.accumulation * (2 if not shape.joint and shape.storage == "replay" else 1)
        large = [size for size in (*shape.sizes, shape.table) if size > PERSISTENT]
        for size in large:
            yield Collective("weights", "all_gather", size * shape.number_bytes, passes)
        calls = max(1, len(shape.sizes) - len(large))
        rest = (shape.trained - sum(large)) * shape.number_bytes
        yield Collective("small weights", "all_gather", rest // calls, calls)


def _small(shape: Shape) -> Iterator[Collective]:
    """Yield the small collectives, whose cost is only their latency."""
    numbers = [shape.tasks]  # losses
    if not shape.joint:
        numbers += [shape.tasks**2] * (len(shape.sizes) if shape.storage == "none" else 1)
    if not shape.joint and shape.table and shape.sketch_size is None and shape.reduce != "local":
        yield Collective("numbers of rows", "all_gather", shape.world * shape.tasks * INT64)
    if shape.zero:
        numbers += [1] * len(shape.groups)  # norms
    numbers += [1]  # the stop flag
    yield Collective("small ones", "all_reduce", sum(numbers) // len(numbers) * DOUBLE, len(numbers))
