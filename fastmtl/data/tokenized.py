"""Tokenisation of a task's rows, with a cache on disk."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.readers import Rows
from fastmtl.data.records import BadRow
from fastmtl.errors import UserError, one_line
from fastmtl.files.user_path import cache_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 3
_ARRAYS = ("tokens", "offsets", "second_text")


@dataclass(frozen=True)
class TokenizedDataset:
    """The token ids of n examples of one file.

    An example has S sequences: 2 for a pair whose texts are encoded apart (`pairs: bi`), else 1.
    Example i has the sequences S i to S i + S - 1.

    tokens: int32 [all tokens], memory-mapped.
    offsets: int64 [S n + 1]; sequence s is tokens[offsets[s]:offsets[s + 1]].
    second_text: int32 [S n], the position in the sequence at which the second text (token type 1)
    begins; the length of the sequence if it has one text.
    labels: int64 or float32 [n], or None. ids: the ids of the rows in the file.
    truncated: number of examples that were cut to max_length. skipped, notes: as in `Rows`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    second_text: np.ndarray
    sequences_per_example: int
    labels: np.ndarray | None
    ids: list[str]
    truncated: int
    skipped: list[BadRow]
    path: Path
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, in all its sequences, int64 [n]."""
        return np.diff(self.offsets[:: self.sequences_per_example])

    def digest(self) -> str:
        """Return the SHA-256 of the rows' tokens, offsets, labels and ids."""
        digest = hashlib.sha256(json.dumps([self.sequences_per_example, self.ids]).encode("utf-8"))
        labels = np.zeros(0) if self.labels is None else self.labels
        for array in (self.tokens, self.offsets, self.second_text, labels):
            digest.update(f"{array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, rows: np.ndarray) -> TokenizedDataset:
        """Return a data set of the examples at the positions `rows`, int [k].

        The result is in memory, not memory-mapped.
        """
        per_example = self.sequences_per_example
        sequences = (np.asarray(rows)[:, None] * per_example + np.arange(per_example)).reshape(-1)
        pieces = [self.tokens[self.offsets[s] : self.offsets[s + 1]] for s in sequences]
        return dataclasses.replace(
            self,
            tokens=np.concatenate([np.zeros(0, np.int32), *pieces]),
            offsets=np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]),
            second_text=self.second_text[sequences],
            labels=None if self.labels is None else self.labels[rows],
            ids=[self.ids[row] for row in rows],
        )


def tokenize(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int, cache_dir: str | Path
) -> TokenizedDataset:
    """Return the token ids of `rows`, from the cache in `cache_dir` if they are there.

    The key of a cache entry is a digest of texts, tokenizer and settings. max_length: the most
    tokens of a sequence, [CLS] and [SEP] included; in a pair the longer text is cut first. A
    damaged cache entry is rebuilt. If the cache is not writable, a temporary folder is used and a
    line on standard error says so. Raises UserError where `check_pairs` raises it, and for token
    types other than 0 and 1.
    """
    check_pairs(rows, task)
    bi = task.pairs == "bi"
    key = _digest(rows, tokenizer, bi, max_length)
    entry = cache_path(cache_dir) / f"tokens-{key}"
    arrays = _load(entry)
    if arrays is None:
        made = _encode(rows, tokenizer, bi, max_length)
        try:
            _store(entry, *made)
        except OSError as error:
            entry = _cache_instead(cache_dir, str(error.strerror)) / entry.name
            _store(entry, *made)
        arrays = _load(entry)
        assert arrays is not None
    tokens, offsets, second_text, truncated = arrays
    return TokenizedDataset(
        tokens=tokens,
        offsets=offsets,
        second_text=second_text,
        sequences_per_example=2 if bi else 1,
        labels=rows.labels,
        ids=rows.ids,
        truncated=truncated,
        skipped=rows.skipped,
        path=rows.path,
        notes=rows.notes,
    )


@functools.cache
def _cache_instead(cache_dir: str | Path, why: str) -> Path:
    """Return a temporary folder that replaces the cache, and print a warning.

    why: the reason, for the warning. The result is cached: one folder and one warning per process.
    """
    folder = Path(tempfile.mkdtemp(prefix="fastmtl-"))
    print(one_line(f"fastmtl: data.cache_dir={cache_dir} is not writable ({why}); using {folder}"), file=sys.stderr)
    return folder


def check_token_types(datasets: Iterable[TokenizedDataset | None], token_types: int) -> None:
    """Raise UserError for data with second texts if the encoder has only one token type.

    token_types: rows of the encoder's table of token types; 0 for an encoder without a table, to
    which token types make no difference.
    """
    for dataset in datasets:
        if dataset is not None and token_types == 1 and (dataset.second_text < np.diff(dataset.offsets)).any():
            raise UserError(
                f"{dataset.path}: its pairs need two token types, and the encoder has {token_types} (type_vocab_size "
                "in its config.json): set pairs: bi for this task, or take another encoder"
            )


def check_pairs(rows: Rows, task: TaskConfig) -> None:
    """Raise UserError if the task has `pairs: bi` and its rows have one text each."""
    if task.pairs == "bi" and rows.pair_texts is None:
        raise UserError(f"{rows.path}: pairs: bi needs two texts per row, the file has one; leave `pairs` out")


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the settings that decide how a tokenizer splits texts, as JSON.

    Truncation and padding are left out, since every call sets them.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):
        model.pop(state, None)
    return model


def _digest(rows: Rows, tokenizer: PreTrainedTokenizerBase, bi: bool, max_length: int) -> str:
    import tokenizers
    import transformers

    # Token ids also depend on the versions of the libraries, and on two settings that each call
    # takes from tokenizer_config.json.
    code = [type(tokenizer).__name__, tokenizers.__version__, transformers.__version__]
    call = [tokenizer.truncation_side, getattr(tokenizer, "split_special_tokens", False)]
    digest = hashlib.sha256()
    state = tokenizer_state(tokenizer)
    settings = [CACHE_VERSION, bi, max_length, state, code, call, rows.texts, rows.pair_texts]
    digest.update(json.dumps(settings).encode("utf-8"))
    return digest.hexdigest()[:32]


def _encode(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, bi: bool, max_length: int
) -> tuple[dict[str, np.ndarray], int]:
    if bi:
        assert rows.pair_texts is not None
        texts = [text for pair in zip(rows.texts, rows.pair_texts, strict=True) for text in pair]
        pairs = None
    else:
        texts, pairs = rows.texts, rows.pair_texts
    with _state_kept(tokenizer):
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
    if any(kind != sorted(kind) or kind[-1:] > [1] for kind in types):
        raise UserError(
            f"{rows.path}: the encoder's tokenizer gives token types other than 0 for a first text and 1 for a second; "
            "fix the post_processor of its tokenizer.json"
        )
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    arrays = {
        "tokens": np.fromiter((token for sequence in ids for token in sequence), np.int32, int(lengths.sum())),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "second_text": (lengths - np.fromiter(map(sum, types), np.int64, len(types))).astype(np.int32),
    }
    return arrays, len({index // (2 if bi else 1) for index in long})


@contextmanager
def _state_kept(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
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


def _store(entry: Path, arrays: dict[str, np.ndarray], truncated: int) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    # Write to a temporary folder, then rename: other processes see the whole entry or none.
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        checks = {name: zlib.crc32((temporary / f"{name}.npy").read_bytes()) for name in arrays}
        (temporary / "meta.json").write_text(json.dumps({"truncated": truncated, "crc32": checks}), encoding="utf-8")
        if entry.exists():  # damaged, or another process was faster
            if _load(entry) is not None:
                return
            shutil.rmtree(entry)
        os.rename(temporary, entry)
    except OSError:
        if _load(entry) is None:
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(entry: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, int] | None:
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        if any(zlib.crc32((entry / f"{name}.npy").read_bytes()) != meta["crc32"][name] for name in _ARRAYS):
            return None
        tokens, offsets, second_text = (np.load(entry / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        return tokens, offsets, second_text, int(meta["truncated"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
