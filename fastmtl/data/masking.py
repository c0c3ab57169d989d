"""Batches for masked language modelling: the model predicts 15 % of the tokens of each sequence.

Source: Devlin et al. 2019, section 3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastmtl.config import Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.stream import BatchStream, Draw
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError
from fastmtl_kernels.upload import upload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """A micro-batch for masked language modelling.

    batch: the micro-batch, in which most of the tokens to predict are replaced.
    positions: int64 [M], the M tokens to predict, as positions in batch.input_ids.
    targets: int64 [M], the original ids of these tokens.
    group_counts: one number, how many tokens the whole optimiser step predicts, over all ranks and
    micro-batches.
    """

    batch: PackedBatch
    positions: Tensor
    targets: Tensor
    group_counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    def to(self, device: torch.device | str) -> MaskedBatch:
        """Return the batch on `device`. The host does not wait for the copies."""
        positions, targets = upload(self.positions, device), upload(self.targets, device)
        return MaskedBatch(self.batch.to(device), positions, targets, self.group_counts)

    def map(self, function: Callable[[Tensor], Tensor]) -> MaskedBatch:
        """Return the batch with each tensor replaced by function(tensor)."""
        positions, targets = function(self.positions), function(self.targets)
        return MaskedBatch(self.batch.map(function), positions, targets, self.group_counts)


class MaskedStream(BatchStream):
    """The batches of a `BatchStream`, with tokens masked at random.

    In a sequence of L tokens, max(1, round(0.15 L)) tokens are chosen, but no special tokens. 80 %
    of the chosen tokens become [MASK], 10 % become a random token and 10 % stay. The choice depends
    only on (seed, epoch, step, micro-batch, rank), so a resumed run repeats it.
    """

    def __init__(
        self,
        datasets: Sequence[TokenizedDataset],
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(datasets, recipe, rank, world)
        if tokenizer.mask_token_id is None:
            raise UserError("objective: mlm: the encoder's tokenizer has no [MASK] token")
        self._mask, self._vocabulary = int(tokenizer.mask_token_id), len(tokenizer)
        self._special = np.array(tokenizer.all_special_ids)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[MaskedBatch]]:  # type: ignore[override]
        """Yield one list per step from `start_step`: the micro-batches of this rank in that step.

        A step has `engine.accumulation` micro-batches. epoch, start_step: counted from 0.
        """
        for step, group in self._groups(epoch, start_step):
            total = sum(self._number(share) for shares in group for share in shares)
            yield [
                self._masked(self._pack(shares[self._rank], ()), total, [epoch, step, part])
                for part, shares in enumerate(group)
            ]

    def _number(self, draw: Draw) -> int:
        """Return the number of tokens to predict in `draw`, one rank's rows of a micro-batch."""
        tasks, rows = draw
        number = 0
        for t, dataset in enumerate(self._datasets):
            sequences = dataset.sequences(rows[tasks == t])
            number += int(_chosen(dataset.offsets[sequences + 1] - dataset.offsets[sequences]).sum())
        return number

    def _masked(self, batch: PackedBatch, total: int, at: list[int]) -> MaskedBatch:
        random = np.random.default_rng([self._recipe.seed, *at, self._rank])
        ids = batch.input_ids.numpy().copy()
        lengths = np.diff(batch.host.cu_seqlens)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        draw = random.random(len(ids))
        special = np.isin(ids, self._special)
        order = np.lexsort((draw + special, sequence))  # random order within each sequence, special tokens last
        place = np.arange(len(ids)) - np.asarray(batch.host.cu_seqlens)[sequence]  # the order keeps sequences together
        positions = np.sort(order[(place < _chosen(lengths)[sequence]) & ~special[order]])
        targets = ids[positions]
        what = random.random(len(positions))
        ids[positions[what < MASKED]] = self._mask
        replaced = positions[(what >= MASKED) & (what < MASKED + RANDOM)]
        ids[replaced] = random.integers(0, self._vocabulary, len(replaced))
        return MaskedBatch(
            batch=dataclasses.replace(batch, input_ids=torch.from_numpy(ids)),
            positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
            group_counts=(total,),
        )


def _chosen(lengths: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.round(SHARE * lengths)).astype(np.int64)
