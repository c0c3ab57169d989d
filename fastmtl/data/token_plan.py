"""Micro-batches filled by tokens: the assignment of rows to ranks, in whole optimiser steps.

A cell is one rank's share of one micro-batch, a list of positions in the epoch's sequence.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Cell = list[int]


def filled(lengths: Sequence[int], budget: int, world: int) -> list[list[Cell]]:
    """Return micro-batches of `world` cells, filled in the order of the sequence.

    A row goes to the rank with the fewest tokens so far. If it does not fit there, a new
    micro-batch begins. The last micro-batch may have empty cells.

    lengths: tokens of each row, at most `budget` each.
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
    """Return a plan of whole steps of `accumulation` micro-batches without empty cells.

    plan: the result of `filled`. A plan of whole steps is returned unchanged. Otherwise the last
    steps are rebuilt, as few as have a row for each cell, by halving their cells. Half a cell is
    within the budget. If no number of last steps has enough rows (they are so long that nearly
    every cell has one), the rows of the last step, fewer than accumulation * world, are left out.
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
    """Return the same rows in `number` cells, by halving the cell with the most rows repeatedly."""
    heap = [(-len(cell), cell) for cell in cells]
    heapq.heapify(heap)
    while len(heap) < number:
        _, cell = heapq.heappop(heap)
        for half in (cell[::2], cell[1::2]):  # each half has the tasks of the whole cell
            heapq.heappush(heap, (-len(half), half))
    return [cell for _, cell in heap]


def _dealt(cells: list[Cell], lengths: Sequence[int], world: int) -> list[list[Cell]]:
    """Return micro-batches of cells with similar numbers of tokens, so that no rank waits long."""
    tokens = np.array([sum(lengths[index] for index in cell) for cell in cells])
    order = np.argsort(-tokens, kind="stable").tolist()
    return [[cells[index] for index in order[start : start + world]] for start in range(0, len(order), world)]
