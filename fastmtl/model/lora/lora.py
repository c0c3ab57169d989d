"""LoRA (Hu et al. 2021): y = W x + scale B A dropout(x) in chosen linear layers of the encoder.

scale is alpha / r, or alpha / sqrt(r) with rsLoRA. A [r, in] begins as in PEFT, B [out, r] as zero.

With `tasks: shared` there is one pair (A, B) in each chosen layer. It is shared by all tasks like
the encoder's weights: its task gradients go to the sink (Ortho-LoRA, arXiv 2601.09684). With
`tasks: own` the pairs are stacked over the tasks, A [T, r, in] and B [T, out, r], and each task's
rows use their own.

Weights are in this module and not in the encoder, so the encoder's tensors keep their names.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from fastmtl.config import LoraConfig
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.context import ADAPTER, ForwardContext
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.lora.targets import Place, find_places
from fastmtl.model.owners import Owner, within
from fastmtl.surgery import functional
from fastmtl_kernels import dropout, low_rank


class Pair(Owner):
    """The matrices A and B of one layer.

    Attributes lora_A: [r, in], or [T, r, in] with T pairs. lora_B: [out, r], or [T, out, r].
    """

    def __init__(self, in_features: int, out_features: int, rank: int, num_tasks: int | None) -> None:
        super().__init__()
        stacked = () if num_tasks is None else (num_tasks,)
        self.lora_A = nn.Parameter(torch.empty(*stacked, rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(*stacked, out_features, rank))
        for matrix in self.lora_A.unsqueeze(0).flatten(0, -3):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


class Lora(nn.Module):
    """The LoRA of all chosen layers of an encoder.

    Attribute pairs: {name of the layer in the encoder: its Pair}. Parameters have these names after
    `shared.` or `own.`: `shared.encoder.layer.0.attention.self.query.lora_A`.
    """

    def __init__(self, config: LoraConfig, encoder: PackedEncoder, places: list[Place], num_tasks: int) -> None:
        super().__init__()
        self.config, self.by_task = config, config.tasks == "own"
        assert config.rank is not None
        root = nn.Module()
        self.add_module(config.tasks, root)
        self.pairs: dict[str, Pair] = {}
        # The number of a pair among those of its layer tells its dropout mask from theirs.
        self._of: dict[nn.Module, tuple[Pair, int]] = {}
        for place in places:
            linear = cast(nn.Linear, encoder.get_submodule(place.name))
            stacked = num_tasks if self.by_task else None
            pair = Pair(linear.in_features, linear.out_features, config.rank, stacked)
            _put(root, place.name, pair)
            self.pairs[place.name] = pair
            self._of[linear] = pair, place.number

    def term(self, linear: nn.Module, x: Tensor, context: ForwardContext) -> Tensor | None:
        """Return scale B A dropout(x) [N, out] for the input x [N, in] of a linear layer.

        None for a layer without LoRA.
        """
        found = self._of.get(linear)
        if found is None:
            return None
        pair, number = found
        seed = context.seed(ADAPTER) if self.training and self.config.dropout else None
        scale = self.config.scale

        def call(x: Tensor) -> Tensor:
            if seed is not None:
                x = dropout(x, self.config.dropout, seed + 1 + number)
            if self.by_task:
                return low_rank(x, pair.lora_A.mT, pair.lora_B.mT * scale, context.segments)
            low = functional.linear(x, pair.lora_A, None, context.segments, context.task_grads)
            return functional.linear(low * scale, pair.lora_B, None, context.segments, context.task_grads)

        return within((pair,), x, call)

    @torch.no_grad()
    def merge_into(self, encoder: nn.Module, task: int | None) -> None:
        """Add scale B A to the weights of an encoder, which then needs no LoRA.

        task: the number of the task if each has its own LoRA, else None.
        """
        for name in self.pairs:
            a, b = self.matrices(name, task)
            encoder.get_parameter(f"{name}.weight").add_(b @ a, alpha=self.config.scale)

    def matrices(self, name: str, task: int | None) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r] of the layer `name`. task: as in `merge_into`."""
        pair = self.pairs[name]
        if not self.by_task:
            return pair.lora_A.detach(), pair.lora_B.detach()
        assert task is not None
        return pair.lora_A.detach()[task], pair.lora_B.detach()[task]


def build_lora(config: LoraConfig, encoder: Encoder, num_tasks: int) -> Lora | None:
    """Build the LoRA of a recipe; None if the recipe has none.

    Raises UserError, naming the key, for layers that the encoder does not have.
    """
    if not config.used:
        return None
    assert isinstance(encoder, PackedEncoder), "Encoder.check_recipe refuses a LoRA for others"
    return Lora(config, encoder, find_places(config, encoder), num_tasks)


def _put(root: nn.Module, name: str, pair: Pair) -> None:
    """Make `pair` the submodule `name` of `root`; modules on the way are made where they lack."""
    *way, last = name.split(".")
    for part in way:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, pair)
