"""Models with compiled parts: modules with shared parameters run between the graphs.

torch's compiler traces with the backend aot_eager, which needs no C++ compiler and little time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery

pytestmark = pytest.mark.slow(5)

TASKS = torch.tensor([0, 1, 0, 0, 1, -1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up: Any = nn.Linear(4, 6)
        self.act: Any = nn.Sequential(nn.Tanh(), nn.Tanh(), nn.GELU())
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x)))).tanh()


class Trunk(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: Any = nn.Linear(3, 4)
        self.blocks: Any = nn.ModuleList([Block() for _ in range(blocks)])
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x.mean(1)


def nothing(trunk: Trunk) -> None:
    pass


def blocks(trunk: Trunk, **options: Any) -> None:
    for block in trunk.blocks:
        block.compile(backend="aot_eager", **options)


def replaced_blocks(trunk: Trunk) -> None:
    trunk.blocks = nn.ModuleList([torch.compile(block, backend="aot_eager") for block in trunk.blocks])


def activations(trunk: Trunk) -> None:
    for block in trunk.blocks:
        block.act = torch.compile(block.act, backend="aot_eager")


def checkpointed_blocks(trunk: Trunk) -> None:
    blocks(trunk)
    trunk.checkpoints = True


def train(
    before: Callable[[Trunk], object] = nothing, after: Callable[[Trunk], object] = nothing, **options: Any
) -> list[Tensor]:
    """Return the weights after three steps. before, after: change the trunk around attaching."""
    trunk = Trunk()
    before(trunk)
    heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(2)])
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
    surgery = GradientSurgery(optimizer, tasks=["a", "b"], model=trunk, **{"verify_every": 2, **options})
    after(trunk)
    x = torch.randn(len(TASKS), 3, 3, generator=torch.Generator().manual_seed(1))

    def loss_fn(x: Tensor) -> dict[str, tuple[Tensor, int]]:
        with surgery.rows(TASKS):
            hidden = trunk(x)
        rows = [heads[task](hidden[TASKS == task]) for task in range(2)]
        return {"a": ((rows[0] - 2).square().sum(), 3), "b": ((rows[1] + 3).square().sum(), 2)}

    for _ in range(3):
        optimizer.zero_grad()
        surgery.run([x], loss_fn)
        optimizer.step()
    return [parameter.detach() for parameter in trunk.parameters()]


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    return train()


@pytest.mark.parametrize("change", [blocks, replaced_blocks, activations, checkpointed_blocks])
def test_compiled_parts_give_the_same_weights(plain: list[Tensor], change: Callable[[Trunk], object]) -> None:
    torch.testing.assert_close(train(before=change), plain)


@pytest.mark.parametrize("storage", ["kept", "replay"])
def test_blocks_that_are_compiled_later(plain: list[Tensor], storage: str) -> None:
    torch.testing.assert_close(train(after=blocks, storage=storage), plain)


def test_equal_blocks_have_the_same_graphs() -> None:
    def graphs(number: int) -> int:
        torch._dynamo.reset()
        counts = torch._dynamo.testing.CompileCounter()
        trunk = Trunk(number)
        surgery = GradientSurgery(torch.optim.SGD(trunk.parameters()), tasks=["a", "b"], model=trunk, verify_every=0)
        for block in trunk.blocks:
            block.compile(backend=counts)
        with surgery.rows(TASKS):
            trunk(torch.randn(len(TASKS), 3, 3))
        return counts.frame_count

    assert graphs(5) == graphs(2) > 0


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (lambda trunk: trunk.compile(), {}, "model: it is compiled as a whole"),
        (lambda trunk: trunk.blocks[1].up.compile(), {}, r"module blocks.1.up \(Linear\) is compiled as a whole"),
        (
            lambda trunk: setattr(trunk.blocks[0], "up", torch.compile(trunk.blocks[0].up)),
            {},
            r"module blocks.0.up \(Linear\) is compiled as a whole",
        ),
        (activations, {"per_task_modules": ["Block"]}, r"module blocks.0.act \(Sequential\) is compiled"),
    ],
)
def test_modules_that_run_outside_of_graphs_are_not_compiled(
    change: Callable[[Trunk], object], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        train(before=change, **options)


def test_a_whole_graph_is_refused() -> None:
    torch._dynamo.reset()
    with pytest.raises(UserError, match="a block is compiled with fullgraph=True"):
        train(before=lambda trunk: blocks(trunk, fullgraph=True))


def test_a_pass_per_task_through_a_graph_that_frees_its_buffers() -> None:
    def used(trunk: Trunk) -> None:
        torch._dynamo.reset()
        activations(trunk)
        trunk(torch.zeros(len(TASKS), 3, 3)).sum().backward()

    with pytest.raises(UserError, match="donated_buffer = False before compiling"):
        train(before=used, passes="per_task", verify_every=None)
