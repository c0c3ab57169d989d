"""Steps of made-up task gradients: a dense parameter and an embedding table with any rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastmtl.surgery.sinks.stack import StackSink

V = 30
# Rows of each task's first piece: few, none at all, more than in any earlier step, one task alone.
SIZES = [(3, 4, 2), (0, 0, 0), (40, 1, 30), (0, 9, 0), (2, 8, 5)]


def make_parameters(device: str = "cpu") -> list[nn.Parameter]:
    """Return a dense parameter, a table, and a table that no step uses."""
    return [nn.Parameter(torch.zeros(size, device=device)) for size in ((4, 5), (V, 3), (6, 2))]


def steps_of(sinks: list[StackSink], parameters: list[nn.Parameter]) -> Iterator[int]:
    """Yield the number of each step, run alike in each sink; tasks share ids, in two pieces."""
    weight, table, _ = parameters
    device = weight.device
    random = torch.Generator().manual_seed(sinks[0].num_tasks)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(device)

    for number, sizes in enumerate(SIZES):
        for sink in sinks:
            sink.clear()
            sink.arm(device)
        for task in range(sinks[0].num_tasks):
            gradient = draw(4, 5)
            for sink in sinks:
                if number != 3 or task:  # except for an absent one
                    sink.stack_of(weight).add_task(weight, task, gradient)
            for size in (sizes[task], 2 if sizes[task] else 0):
                ids, rows = torch.randint(V, (size,), generator=random).to(device), draw(size, 3)
                for sink in sinks:
                    sink.add_rows(table, task, ids, rows)
        for sink in sinks:
            sink.disarm()
        yield number
