"""Assignment of rows to micro-batches and ranks under a budget of tokens (`sampler.batch_tokens`).

A cell is the rows of one rank in one micro-batch: a list of positions in the epoch's sequence of
rows. A plan is a list of micro-batches, each a list of one cell per rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Cell = list[int]


def filled(lengths: Sequence[int], budget: int, world: int) -> list[list[Cell]]:
    """Return a plan for all rows, filled in the order of the sequence.

    A row goes to the cell with the fewest tokens. If the row does not fit there, a new micro-batch
    begins. The last micro-batch may have empty cells.

    lengths: tokens of each row, at most `budget`. budget: the most tokens of a cell. world: the
    number of ranks.
    """
    plan: list[list[Cell]] = []
    loads: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        if not loads or loads[0][0] + length > budget:
            plan.append([[] for _ in range(world)])
            loads = [(0, rank) for rank in range(world)]
        load, rank = heapq.heappop(loads)
        plan[-1][rank].append(index)
        heapq.heappush(loads, (load + length, rank))
    return plan


def whole_steps(plan: list[list[Cell]], lengths: Sequence[int], accumulation: int, world: int) -> list[list[Cell]]:
    """Return the plan, changed so that every step is whole.

    A whole step has `accumulation` micro-batches and no empty cell. plan: the result of `filled`.
    If its last step is not whole, the cells of the last steps are halved until there are enough;
    half a cell stays within the budget. This rebuilds the fewest last steps that have a row for
    each cell. If no number of last steps has enough rows (rows so long that nearly every cell has
    one row), the last step is left out: fewer than accumulation * world rows.
    """
    if len(plan) % accumulation == 0 and all(map(all, plan[-1:])):
        return plan
    last = (len(plan) - 1) // accumulation * accumulation  # start of the last step
    rows = 0
    for begin in range(last, -1, -accumulation):
        rows += sum(len(cell) for parts in plan[begin : begin + accumulation] for cell in parts)
        if rows >= (last - begin + accumulation) * world:
            cells = [cell for parts in plan[begin:] for cell in parts if cell]
            return plan[:begin] + _dealt(_halved(cells, (last - begin + accumulation) * world), lengths, world)
    return plan[:last]


def _halved(cells: list[Cell], number: int) -> list[Cell]:
    """Return `number` cells with the rows of `cells`, by halving the fullest cell repeatedly."""
    heap = [(-len(cell), cell) for cell in cells]
    heapq.heapify(heap)
    while len(heap) < number:
        _, cell = heapq.heappop(heap)
        for half in (cell[::2], cell[1::2]):  # every second row, so that both halves have a similar mix of tasks
            heapq.heappush(heap, (-len(half), half))
    return [cell for _, cell in heap]


def _dealt(cells: list[Cell], lengths: Sequence[int], world: int) -> list[list[Cell]]:
    """Return micro-batches of `world` cells each.

    The cells of a micro-batch have similar numbers of tokens, so that no rank waits long.
    """
    tokens = np.array([sum(lengths[index] for index in cell) for cell in cells])
    order = np.argsort(-tokens, kind="stable").tolist()
    return [[cells[index] for index in order[start : start + world]] for start in range(0, len(order), world)]
