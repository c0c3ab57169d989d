"""An analytic model of the peak memory of a training step, without running it.

A step is simulated on a ledger in the order of the code's allocations: tensors kept between steps,
forward and backward layer by layer, the buffers of surgery and DeepSpeed, and the optimiser. The
prediction is the ledger's peak. Nothing is fitted to measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmtl.measure.parts import Bytes, total
from fastmtl.profile import deepspeed
from fastmtl.profile.gradients import (
    delivered_of,
    gradient_of,
    own_gradients,
    scattered,
    scatters,
    stack_of,
    task_gradients_of,
)
from fastmtl.profile.layers import INT64
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.lora import output_gradients
from fastmtl.profile.passes import Pass
from fastmtl.profile.rows import FLOAT
from fastmtl.profile.shape import Shape
from fastmtl.surgery.ranks.collectives import BUCKET
from fastmtl.surgery.sinks.early_scatter import IN_FLIGHT


@dataclass(frozen=True)
class Prediction:
    """The predicted memory of a step.

    parts: bytes by part at the peak. phase: the phase of the peak. kept: bytes between steps.
    """

    parts: Bytes
    kept: Bytes
    phase: str

    @property
    def nbytes(self) -> int:
        return total(self.parts)


def predict(shape: Shape) -> Prediction:
    kept = deepspeed.kept(shape)
    kept["activations"] = shape.rotations * FLOAT  # made in the first forward
    if shape.storage == "stacked" and not shape.joint:
        kept["task gradients"] = shape.tasks * shape.dense * shape.j_bytes
    if shape.squares:
        sums = deepspeed.share(shape.tasks * (shape.dense + shape.table) * FLOAT, shape.world)
        kept["task gradients"] = kept.get("task gradients", 0) + sums
    ledger = Ledger(kept)
    if shape.in_hand:
        _joint_in_hand(ledger, shape)
    elif shape.joint or shape.storage == "none":
        _own_pass(ledger, shape)
    elif shape.storage == "stacked":
        _stacked(ledger, shape)
    elif shape.storage == "kept":
        _kept(ledger, shape)
    else:
        _first_pass(ledger, shape)
        _own_pass(ledger, shape)
    ledger.phase = "optimiser"
    deepspeed.optimiser(ledger, shape)
    return Prediction(ledger.peak, kept, ledger.at)


def _own_pass(ledger: Ledger, shape: Shape) -> None:
    """Run the engine's own forward and backward: gradients go to the parameters."""
    for number in range(shape.accumulation):
        first, last = number == 0, number == shape.accumulation - 1
        pass_ = Pass(ledger, shape, number)
        pass_.forward()
        deepspeed.begin_backward(ledger, shape, first)
        pass_.backward(gradient_of(shape, first))
        deepspeed.end_backward(ledger, shape, last)


def _joint_in_hand(ledger: Ledger, shape: Shape) -> None:
    """Run the backward of a summed loss: all gradients exist before DeepSpeed gets one."""
    pass_ = Pass(ledger, shape, 0)
    pass_.forward()
    pass_.backward(gradient_of(shape, first=True))
    deepspeed.reduce_in_hand(ledger, shape)


def _first_pass(ledger: Ledger, shape: Shape) -> None:
    """Run the first of replay's two passes, which computes the Gramian."""
    keeps = (shape.accumulation > 1 or shape.squares) and shape.sketch_size is None
    before = ledger.held["task gradients"]
    ledger.hold("task gradients", _sketch(shape))
    for number in range(shape.accumulation):
        pass_ = Pass(ledger, shape, number)
        pass_.forward()
        pass_.backward(task_gradients_of(shape, keeps and number == 0), own=0)
        _compact_rows(ledger, shape, number)
    ledger.phase = "surgery"
    ledger.touch(_gramian_of_rows(shape))
    ledger.touch(_squares(shape))
    ledger.drop("task gradients", ledger.held["task gradients"] - before)


def _stacked(ledger: Ledger, shape: Shape) -> None:
    ledger.hold("task gradients", _sketch(shape))
    with own_gradients(ledger, shape) as take:
        for number in range(shape.accumulation):
            pass_ = Pass(ledger, shape, number)
            pass_.forward()
            pass_.backward(stack_of(shape, sends=number == shape.accumulation - 1), own=shape.own * shape.number_bytes)
            take()
            _compact_rows(ledger, shape, number)
        if scatters(shape):
            _last_pieces(ledger, shape)
        ledger.phase = "surgery"
        ledger.touch(_gramian_of_rows(shape))
        shares = deepspeed.share(shape.tasks * shape.dense * shape.j_bytes, shape.world) if scatters(shape) else 0
        ledger.touch(_squares(shape) + (shares if shape.squares else 0))
        ledger.hold("gradients", shape.dense * shape.merged_bytes)
        if shape.merged_bytes not in (shape.j_bytes, FLOAT):  # merged in float32, then rounded
            ledger.touch(shape.dense * FLOAT)
        _merged_table(ledger, shape)
        ledger.hold("gradients", shape.own * FLOAT)  # scaled
        ledger.phase = "communication"
        deepspeed.hand_over(ledger, shape)


def _kept(ledger: Ledger, shape: Shape) -> None:
    """Run `kept`: inputs stay as activations, output gradients as task gradients, for surgery."""
    numbers, narrow, linears = shape.number_bytes, shape.number_bytes < FLOAT, shape.shared_linears
    lora = shape.lora if shape.lora is not None and shape.lora.shared else None
    tables = (shape.positions + shape.types) * shape.embedding if shape.encoder_trained else 0
    vectors = shape.dense - tables - linears
    ledger.hold("task gradients", _sketch(shape))
    with own_gradients(ledger, shape) as take:
        for number in range(shape.accumulation):
            pass_ = Pass(ledger, shape, number)
            pass_.forward()
            ledger.hold("task gradients", shape.tasks * vectors * FLOAT if number == 0 else 0)
            pass_.backward(delivered_of(shape, stays=number == 0), own=shape.own * numbers)
            take()
            _compact_rows(ledger, shape, number)
        ledger.phase = "surgery"
        matrix = shape.hidden * shape.intermediate if shape.encoder_trained or lora is None else lora.largest
        largest = shape.tasks * matrix
        with ledger.holding(largest * numbers):
            ledger.touch(scattered(shape, largest) + (largest * FLOAT if narrow and scatters(shape) else 0))
            ledger.touch(shape.tasks * vectors * FLOAT)
        ledger.touch(_gramian_of_rows(shape))
        ledger.hold("gradients", (shape.dense - linears) * shape.merged_bytes)
        ledger.drop("task gradients", shape.tasks * (vectors + tables) * FLOAT)
        rows = _tokens(shape)
        inputs = ledger.held["activations"] // max(1, shape.layers)
        gradients = rows * output_gradients(shape) * numbers
        weighted = rows * shape.intermediate * (numbers + (FLOAT if narrow else 0))
        uses = shape.layers // max(1, shape.own_layers)
        if uses > 1:  # inputs and weighted gradients of a shared weight's uses are concatenated
            ledger.touch(3 * uses * rows * shape.hidden * numbers)
        for _ in range(shape.layers):
            ledger.touch(weighted)
            ledger.hold("gradients", linears // shape.layers * shape.merged_bytes)
            ledger.drop("activations", inputs)
            ledger.drop("task gradients", gradients)
        _merged_table(ledger, shape)
        ledger.hold("gradients", shape.own * FLOAT)  # scaled
        ledger.phase = "communication"
        deepspeed.hand_over(ledger, shape)


def _compact_rows(ledger: Ledger, shape: Shape, number: int) -> None:
    """Keep the word embeddings' gradient: rows and their ids."""
    if shape.table and not (shape.sketch_size is not None and shape.storage == "replay"):
        row = shape.embedding * shape.number_bytes + INT64
        ledger.hold("task gradients", shape.loads[number].tokens * row)


def _merged_table(ledger: Ledger, shape: Shape) -> None:
    ledger.hold("gradients", shape.table * FLOAT)
    if shape.table:  # weighted rows; on GPUs those of all tasks, and a concatenated copy
        rows = 2 * _tokens(shape) if shape.on_gpu else shape.load.largest_task
        ledger.touch(rows * shape.embedding * FLOAT)


def _last_pieces(ledger: Ledger, shape: Shape) -> None:
    """Send the last pieces of J, which are complete when backward ends.

    The last piece may be padded. All shares are concatenated.
    """
    numbers, shares = shape.tasks * shape.dense, deepspeed.share(shape.tasks * shape.dense * shape.j_bytes, shape.world)
    padded = ((numbers - 1) % BUCKET + 1) * shape.j_bytes if shape.dense % shape.world else 0
    copies = min(numbers, IN_FLIGHT * BUCKET) * shape.j_bytes
    ledger.touch(copies + padded)
    ledger.hold("workspace", shares - ledger.held["workspace"])
    ledger.phase = "surgery"
    ledger.touch(max(copies, shares))
    ledger.drop("workspace", shares)


def _sketch(shape: Shape) -> int:
    return 0 if shape.sketch_size is None else shape.tasks * shape.sketch_size * FLOAT


def _squares(shape: Shape) -> int:
    """Return temporary bytes of the squares of task gradients, which are computed in pieces.

    With replay each parameter is a piece. The rows of word embeddings are kept until then.
    """
    if not shape.squares:
        return 0
    numbers = shape.largest if shape.storage == "replay" else shape.dense
    piece = min(BUCKET, deepspeed.share(shape.tasks * numbers, shape.world)) * FLOAT
    rows = shape.embedding * FLOAT if shape.table else 0
    return max(3 * piece, 3 * shape.load.largest_task * rows) + _tokens(shape) * rows


def _gramian_of_rows(shape: Shape) -> int:
    """Return temporary bytes of the Gramian of rows: sums over equal ids, copies of a task's rows.

    On GPUs the rows are concatenated before. Over ranks the occurring rows are gathered and summed
    once more. Then each pair of tasks copies one task's rows.
    """
    if not shape.table or shape.sketch_size is not None:
        return 0
    own, gathered = _tokens(shape), sum(load.unique for load in shape.loads) * shape.world
    rows = max(2 * own if shape.on_gpu else own, own + shape.load.largest_task)
    if shape.world > 1 and shape.reduce == "exact":
        rows = max(rows, own + 3 * gathered)
    return rows * shape.embedding * FLOAT


def _tokens(shape: Shape) -> int:
    """Return the tokens of the whole step."""
    return sum(load.tokens for load in shape.loads)


__all__ = ["Prediction", "predict"]
