"""Micro-batches that are filled by tokens: which rows of a sequence go to which rank, in whole
optimiser steps.

A cell is one rank's share of one micro-batch: a list of positions in the sequence.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Cell = list[int]


def filled(lengths: Sequence[int], budget: int, world: int) -> list[list[Cell]]:
    """Return micro-batches of `world` cells, filled in the order of the sequence: a row goes to the
    rank with the fewest tokens so far, and where it does not fit there a micro-batch begins.

    lengths: tokens of each row, at most `budget` each. The last micro-batch may have empty cells.
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
    """Return a plan of whole steps of `accumulation` micro-batches, without empty cells, from one
    of `filled`.

    A plan that is whole stays as it is. Otherwise cells at its end are halved until the last step
    is whole: as few steps as have a row for each cell are made anew. Half a cell keeps its budget.
    Where there is no such end (rows so long that nearly every cell has one), the rows of the last
    step, fewer than accumulation * world, are left out.
    """
    if len(plan) % accumulation == 0 and all(map(all, plan[-1:])):
        return plan
    last = (len(plan) - 1) // accumulation * accumulation  # where the last step begins
    rows = 0
    for begin in range(last, -1, -accumulation):
        rows += sum(len(cell) for parts in plan[begin : begin + accumulation] for cell in parts)
        if rows >= (last - begin + accumulation) * world:
            cells = [cell for parts in plan[begin:] for cell in parts if cell]
            return plan[:begin] + _dealt(_halved(cells, (last - begin + accumulation) * world), lengths, world)
    return plan[:last]


def _halved(cells: list[Cell], number: int) -> list[Cell]:
    """Return `number` cells with the same rows: the one with the most rows is halved until there
    are so many.
    """
    heap = [(-len(cell), cell) for cell in cells]
    heapq.heapify(heap)
    while len(heap) < number:
        _, cell = heapq.heappop(heap)
        for half in (cell[::2], cell[1::2]):  # each has the tasks of the whole cell
            heapq.heappush(heap, (-len(half), half))
    return [cell for _, cell in heap]


def _dealt(cells: list[Cell], lengths: Sequence[int], world: int) -> list[list[Cell]]:
    """Return micro-batches of cells with about as many tokens, so that no rank waits for another."""
    tokens = np.array([sum(lengths[index] for index in cell) for cell in cells])
    order = np.argsort(-tokens, kind="stable").tolist()
    return [[cells[index] for index in order[start : start + world]] for start in range(0, len(order), world)]
