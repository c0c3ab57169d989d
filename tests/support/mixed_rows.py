"""A small model whose rows may mix in several ways, and its training with surgery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.losses import Losses

WIDTH, LENGTH, TASKS = 6, 8, ("first", "second", "third")
# Eight rows, as many as a row has positions, of which one belongs to no task.
TASK_OF_ROW = torch.tensor([0, 1, 0, 2, 1, 0, -1, 2])


class Scale(nn.Module):
    """A module without a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Trunk(nn.Module):
    """Encoder of rows [B, LENGTH]. mix: a key of MIXES, after whose operation a layer follows."""

    def __init__(self, mix: str = "", checkpointed: bool = False) -> None:
        super().__init__()
        self.words: Any = nn.Embedding(11, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.norm, self.scale, self.dropout = nn.LayerNorm(WIDTH), Scale(), nn.Dropout(0.2)
        self.batch_norm, self.trained_norm = nn.BatchNorm1d(LENGTH, affine=False), nn.BatchNorm1d(LENGTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.mix, self._checkpointed = MIXES[mix], checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = checkpoint(self._layer, x, use_reentrant=False) if self._checkpointed else self._layer(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.mix(self, x)).mean(1)

    def _layer(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(self.twice(self.dropout(self.twice(x).tanh()))))


def across_positions(trunk: Trunk, x: Tensor) -> Tensor:
    """Apply a Linear to [LENGTH, B, WIDTH], whose first dimension looks like rows."""
    return x + trunk.twice(x.transpose(0, 1)).transpose(0, 1)


def attend(trunk: Trunk, x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat @ flat.t() / 50).softmax(1).mm(flat).view_as(x)


MIXES: Mapping[str, Callable[[Trunk, Tensor], Tensor]] = {
    "": lambda trunk, x: x,
    "batch norm": lambda trunk, x: trunk.batch_norm(x),
    "trained batch norm": lambda trunk, x: trunk.trained_norm(x),
    "mean of the batch": lambda trunk, x: x * (1 + x.mean(0)),
    "attention": attend,
    "transposed": across_positions,
}


def task_losses(heads: nn.ModuleDict, features: Tensor, negatives: bool) -> Losses:
    """Return each task's loss. negatives: True to contrast its rows with all rows of the batch."""
    found = {}
    for number, name in enumerate(TASKS):
        rows = TASK_OF_ROW == number
        loss = heads[name](features[rows]).float().square().sum()
        if negatives:
            scores = features[rows] @ features.t()
            loss = loss + F.cross_entropy(scores, rows.nonzero().squeeze(1), reduction="sum")
        found[name] = loss, int(rows.sum())
    return found


def train(
    steps: int = 2,
    *,
    mix: str = "",
    negatives: bool = False,
    evaluates: bool = False,
    accumulation: int = 1,
    checkpointed: bool = False,
    dtype: torch.dtype = torch.float32,
    dtype_of_j: torch.dtype = torch.float32,
    autocast: bool = False,
    in_loop: bool = False,
    factors: Sequence[float] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train for some steps and return all numbers that they leave behind.

    negatives: True for losses with in-batch negatives. evaluates: True for a trunk in evaluation
    mode. factors: of each step's first loss. in_loop: True to call `backward` instead of `run`.
    options: of GradientSurgery. Raises UserError, after a check that no parameter has a gradient.
    """
    torch.manual_seed(0)
    trunk = Trunk(mix, checkpointed).to(dtype).train(not evaluates)
    heads = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2)) for name in TASKS}).to(dtype)
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
    surgery = GradientSurgery(
        optimizer, tasks=TASKS, model=trunk, sparse=[trunk.words.weight], dtype=dtype_of_j, seed=1, **options
    )
    counts = {name: accumulation * int((TASK_OF_ROW == number).sum()) for number, name in enumerate(TASKS)}
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if autocast:
        context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    infos, factor = [], 1.0

    def losses_of(ids: Tensor) -> Losses:
        with context(), surgery.rows(TASK_OF_ROW):
            found = dict(task_losses(heads, trunk(ids), negatives))
        found[TASKS[0]] = found[TASKS[0]][0] * factor, found[TASKS[0]][1]
        return found

    for step in range(steps):
        factor = factors[step] if step < len(factors) else 1.0
        batches = [torch.randint(0, 11, (len(TASK_OF_ROW), LENGTH)) for _ in range(accumulation)]
        try:
            if not in_loop:
                infos.append(surgery.run(batches, losses_of, counts))
            for number, ids in enumerate(batches if in_loop else (), start=1):
                info = surgery.backward(losses_of(ids), counts, last=number == accumulation)
                infos += [] if info is None else [info]
        except UserError:
            assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
            raise
        if infos[-1].skipped is None:
            optimizer.step()
        optimizer.zero_grad()
    surgery.detach()
    tensors = [*trunk.state_dict().values(), *heads.state_dict().values(), torch.get_rng_state()]
    return {"tensors": tensors, "infos": infos}
