"""Memory of the gradients of parameters while backward computes them, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastmtl.profile import deepspeed
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import Weight
from fastmtl.profile.rows import FLOAT
from fastmtl.profile.shape import Shape
from fastmtl.surgery.ranks.collectives import BUCKET
from fastmtl.surgery.sinks.early_scatter import IN_FLIGHT


@contextmanager
def own_gradients(ledger: Ledger, shape: Shape) -> Iterator[Callable[[], None]]:
    """Hold the tasks' own gradients in float32, from the first micro-batch to the end.

    The function is called after each micro-batch, whose gradients it takes.
    """
    held = 0

    def take() -> None:
        nonlocal held
        nbytes = shape.own * shape.number_bytes
        if held == 0:
            held = shape.own * FLOAT
            ledger.hold("gradients", 0 if nbytes == held else held)  # float32 gradients are not copied
            ledger.drop("gradients", 0 if nbytes == held else nbytes)
        else:
            ledger.drop("gradients", nbytes)

    yield take
    ledger.drop("gradients", held)


def gradient_of(shape: Shape, first: bool) -> Weight:
    """Return the function that counts autograd's gradient of a parameter.

    In replay's second pass its rows are weighted before. With `scope: tensor` its T task gradients
    are merged. first: the micro-batch is the step's first one.
    """
    keeps = deepspeed.keeps_gradients(shape) and first

    def weight(ledger: Ledger, numbers: int, rows: int) -> None:
        nbytes = numbers * shape.number_bytes
        if not shape.joint and shape.storage == "replay":
            ledger.touch(rows + (rows // shape.number_bytes * FLOAT if shape.number_bytes < FLOAT else 0) + nbytes)
        if not shape.joint and shape.scope == "tensor":
            ledger.touch(2 * shape.tasks * nbytes)
        if keeps:
            ledger.hold("gradients", nbytes)
        else:
            ledger.touch(nbytes, "gradients")

    return weight


def task_gradients_of(shape: Shape, stay: bool) -> Weight:
    """Return the function that counts a parameter's T task gradients, stacked.

    stay: this rank keeps its share, to sum it over micro-batches.
    """
    tasks, number = shape.tasks, shape.number_bytes

    def weight(ledger: Ledger, numbers: int, rows: int) -> None:
        nbytes = tasks * numbers * number
        with ledger.holding(nbytes):
            ledger.touch(nbytes)
            ledger.touch(tasks * numbers * FLOAT if number < FLOAT else 0)
            ledger.touch(scattered(shape, tasks * numbers))
        if stay:
            ledger.hold("task gradients", deepspeed.share(tasks * numbers * FLOAT, shape.world))

    return weight


def scattered(shape: Shape, numbers: int) -> int:
    """Return the bytes for sending a parameter's T gradients, `numbers` together, to the ranks."""
    if shape.world == 1:
        return 0
    copies = 2 if numbers // shape.tasks % shape.world else 1  # one is padded
    piece, share = min(numbers, BUCKET) * shape.number_bytes, numbers * shape.number_bytes // shape.world
    return share + max(copies * piece, share)


def delivered_of(shape: Shape, stays: bool) -> Weight:
    """Return the function that counts task gradients of `kept`: T stacked tables, no Linears.

    stays: there are no earlier tables to add them to.
    """
    tables = (shape.positions * shape.embedding, shape.types * shape.embedding)

    def weight(ledger: Ledger, numbers: int, rows: int) -> None:
        nbytes = shape.tasks * numbers * FLOAT if numbers in tables else 0
        with ledger.holding(nbytes):
            ledger.touch(0 if stays else 2 * nbytes)
            ledger.hold("task gradients", nbytes if stays else 0)

    return weight


def stack_of(shape: Shape, sends: bool) -> Weight:
    """Return the function that counts task gradients of `stacked`.

    They are added into J directly if the dtypes are equal. sends: complete pieces go to the ranks,
    and this rank keeps its share.
    """
    same, sends = shape.j_bytes == shape.number_bytes, sends and scatters(shape)
    written = 0

    def weight(ledger: Ledger, numbers: int, rows: int) -> None:
        nonlocal written
        ledger.touch(0 if same else numbers * shape.number_bytes)
        if sends:
            before, written = written // BUCKET, written + shape.tasks * numbers
            whole = written // BUCKET
            ledger.hold("workspace", deepspeed.share((whole - before) * BUCKET * shape.j_bytes, shape.world))
            ledger.touch(min(whole, IN_FLIGHT) * BUCKET * shape.j_bytes)

    return weight


def scatters(shape: Shape) -> bool:
    """Return whether each rank gets its share of the columns of J, summed over ranks."""
    return shape.world > 1 and shape.reduce == "exact" and shape.dense > 0
