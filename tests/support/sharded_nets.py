"""Nets, rows and cases of tests/support/sharded_cases.py."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
import transformers.models.bert.modeling_bert
from torch import Tensor, nn

from fastmtl.surgery.losses import Losses

TASKS = ["kind", "same", "degree"]
# The rows' tasks in a step; the last one has rows in the first micro-batch of the first rank only.
ROWS = [0, 1, 1, 0, 0, -1, 1, 0, 0, 1, 0, 0, 2, 0, 0, 0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to train a net. net: "bert", or "mixed" without an embedding. half: mixed precision.

    hybrid: HSDP, with two groups that have copies of the shards. options: of GradientSurgery.
    """

    name: str
    method: str = "pcgrad"
    options: tuple[tuple[str, Any], ...] = ()
    net: str = "bert"
    accumulation: int = 1
    checkpointed: bool = False
    half: bool = False
    hybrid: bool = False


CASES = [
    Case("bert", accumulation=2),
    Case("checkpointed", checkpointed=True),
    Case("half", half=True, checkpointed=True),
    Case("mixed", net="mixed"),
    Case("tensor", "gradvac", (("scope", "tensor"),), net="mixed"),
    Case("sum", "sum", net="mixed"),
]
HYBRID = [Case("hybrid", hybrid=True), Case("hybrid-half", hybrid=True, half=True, net="mixed")]


class Scale(nn.Module):
    """A layer without a rule, whose only number is in the shard of one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor).tanh()


class Mixed(nn.Module):
    """A trunk of float inputs, with and without rules, and with attention that runs per task."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 6)
        self.scale = Scale()
        self.block = nn.TransformerEncoderLayer(6, 2, 5, 0.0, batch_first=True)
        self.last = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.one_hot(ids % 7, 7).to(self.first.weight.dtype)
        return self.last(self.block(self.scale(self.first(x))).mean(1))


class Bert(nn.Module):
    """transformers' BertModel in a tiny size."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 5, "max_position_embeddings": 9}
        none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert: Any = transformers.BertModel(transformers.BertConfig(**sizes, **none))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=(ids > 3).long().index_fill(1, torch.tensor([0]), 1))
        return hidden.last_hidden_state[:, 0]


class Net(nn.Module):
    """A trunk and a head per task."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk: Any = Mixed()
        if case.net == "bert":
            self.trunk = Bert()
        self.heads: Any = nn.ModuleDict({name: nn.Linear(6, 2) for name in TASKS})
        if case.checkpointed:
            with warnings.catch_warnings():  # deprecated in favour of a name that older versions lack
                warnings.simplefilter("ignore", FutureWarning)
                self.trunk.bert.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, ids: Tensor, tasks: Tensor) -> Losses:
        hidden = self.trunk(ids)
        losses = {}
        for task, name in enumerate(TASKS):
            rows = tasks == task
            wanted = 2 - 3 * task + (ids[rows, :1] % 3)  # the tasks' gradients conflict
            losses[name] = (self.heads[name](hidden[rows]).float() - wanted).square().sum(), int(rows.sum())
        return losses


def make_part(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return one of `parts` pieces of a step's rows: ids [B, 8], and tasks [B]."""
    draw = torch.Generator().manual_seed(step)
    ids, tasks = torch.randint(0, 40, (len(ROWS), 8), generator=draw), torch.tensor(ROWS)
    place = torch.arange(len(ROWS)) % parts
    place[tasks == 2] = 0
    return ids[place == part], tasks[place == part]


def counts() -> dict[str, int]:
    return {name: ROWS.count(task) for task, name in enumerate(TASKS)}
