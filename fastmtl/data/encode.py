"""Tokenisation of texts and pairs of texts into sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_sequences(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    path: object,
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Tokenise S texts, or S pairs, into a sequence each.

    Returns the arrays tokens, offsets and second_text (see TokenizedDataset), and the positions of
    the sequences that were cut to `max_length` tokens, the longer text first. path: the file, for
    messages. Raises UserError for token types other than 0 and 1.
    """
    texts, pairs = list(texts), None if pairs is None else list(pairs)
    with state_kept(tokenizer):
        # A tokenizer without token types in its model_input_names returns them only on request.
        encoded = tokenizer(texts, pairs, verbose=False, return_token_type_ids=True)
        ids, types = encoded["input_ids"], encoded["token_type_ids"]
        long = [index for index, sequence in enumerate(ids) if len(sequence) > max_length]
        for index in long:
            # A list, since a call with one text drops an empty second text.
            cut = tokenizer(
                texts[index : index + 1],
                None if pairs is None else pairs[index : index + 1],
                truncation="longest_first",
                max_length=max_length,
                return_token_type_ids=True,
            )
            ids[index], types[index] = cut["input_ids"][0], cut["token_type_ids"][0]
    return sequence_arrays(ids, types, path), long


def sequence_arrays(
    ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]], path: object
) -> dict[str, np.ndarray]:
    """Return the arrays tokens, offsets and second_text of S sequences.

    ids, types: the token ids and token types of each sequence. Raises UserError for token types
    other than 0 for a first text and 1 for a second.
    """
    if any(list(kind) != sorted(kind) or list(kind[-1:]) > [1] for kind in types):
        raise UserError(
            f"{path}: the encoder's tokenizer gives token types other than 0 for a first text and 1 for a second; "
            "fix the post_processor of its tokenizer.json"
        )
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return {
        "tokens": np.fromiter((token for sequence in ids for token in sequence), np.int32, int(lengths.sum())),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "second_text": (lengths - np.fromiter(map(sum, types), np.int64, len(types))).astype(np.int32),
    }


@contextmanager
def state_kept(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Restore the tokenizer's truncation and padding after the block.

    A call of the tokenizer changes both, and saving the tokenizer would write them to its file.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
