"""The cache of token ids on disk: a folder per file of rows, with one .npy file per array."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmtl.data.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 5
_TEXTS = 10_000  # texts that are read at once for a digest
_BYTES = 1 << 20  # bytes of an array that are read at once
_MAKING, _ABANDONED = ".making-", 24 * 3600.0  # seconds


class NotWritable(Exception):
    """Raised for an entry that cannot be written, with the reason of the operating system."""


class EntryWriter:
    """A cache entry that grows, written in a temporary folder.

    `finish` gives it its name. So other processes see the whole entry or none. Every method raises
    NotWritable for an error of the file system.
    """

    def __init__(self, entry: Path) -> None:
        self._entry = entry
        self._rows = self._truncated = 0
        self._arrays: dict[str, _GrowingArray] = {}
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(entry.parent)
            self._folder = Path(tempfile.mkdtemp(prefix=_MAKING, dir=entry.parent))
        except OSError as error:
            raise NotWritable(error.strerror) from None

    def append(self, arrays: Mapping[str, np.ndarray], truncated: int, rows: int) -> None:
        """Add the arrays of the next `rows` rows, as `Encode` returns them.

        Arrays whose names end in `offsets` count on from the last value. `row_of` counts on from
        the rows so far.
        """
        try:
            for name, array in arrays.items():
                if name not in self._arrays:
                    self._arrays[name] = _GrowingArray(self._folder / f"{name}.npy", array)
                    continue
                kept = self._arrays[name]
                if name.endswith("offsets"):
                    kept.append(array[1:] + kept.last)
                else:
                    kept.append(array + self._rows if name == "row_of" else array)
        except OSError as error:
            raise NotWritable(error.strerror) from None
        self._rows += rows
        self._truncated += truncated

    def finish(self) -> None:
        """Rename the folder to the entry, unless another process has made the entry already."""
        try:
            for array in self._arrays.values():
                array.finish()
            checks = {name: _crc32(self._folder / f"{name}.npy") for name in self._arrays}
            meta = json.dumps({"truncated": self._truncated, "crc32": checks})
            (self._folder / "meta.json").write_text(meta, encoding="utf-8")
            if self._entry.exists():  # damaged, or another process was faster
                if load_entry(self._entry) is not None:
                    return
                shutil.rmtree(self._entry)
            os.rename(self._folder, self._entry)
        except OSError as error:
            if load_entry(self._entry) is None:
                raise NotWritable(error.strerror) from None

    def close(self) -> None:
        """Remove what is left of the temporary folder."""
        for array in self._arrays.values():
            array.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove the temporary folders of processes that were killed: none has written for a day."""
    for folder in cache.glob(f"{_MAKING}*"):
        with suppress(OSError):  # another process has finished or removed it
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > _ABANDONED:
                shutil.rmtree(folder)


class _GrowingArray:
    """A .npy file to which rows are appended. Its header is written anew at the end."""

    def __init__(self, path: Path, first: np.ndarray) -> None:
        self._file = path.open("wb")
        self._dtype, self._shape, self._rows = first.dtype, first.shape[1:], 0
        self._write_header(len(first))
        self._header = self._file.tell()
        self.append(first)

    def append(self, array: np.ndarray) -> None:
        assert array.dtype == self._dtype and array.shape[1:] == self._shape
        self._file.write(np.ascontiguousarray(array).data)
        self._rows += len(array)
        if len(array):
            self.last = array[-1]

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header(self._rows)
        assert self._file.tell() == self._header, "NumPy leaves room in the header for a longer array"
        self._file.close()

    def close(self) -> None:
        with suppress(OSError):  # a full disk
            self._file.close()

    def _write_header(self, rows: int) -> None:
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def load_entry(entry: Path) -> tuple[dict[str, np.ndarray], int] | None:
    """Return the arrays of an entry, memory-mapped, and the number of truncated examples.

    None if the entry is missing or damaged.
    """
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        names = {"tokens", "offsets", "second_text", *meta["crc32"]}
        if any(_crc32(entry / f"{name}.npy") != meta["crc32"][name] for name in names):
            return None
        return {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in names}, int(meta["truncated"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_BYTES):
            found = zlib.crc32(piece, found)
    return found


def entry_key(rows: Rows, tokenizer: PreTrainedTokenizerBase, of_type: list[Any], max_length: int) -> str:
    """Return the name of the rows' entry, a digest of their texts, the tokenizer and the settings.

    of_type: the module of the function that tokenises, and its settings.
    """
    import tokenizers
    import transformers

    # Token ids also depend on the versions of the libraries, and on two settings that each call
    # takes from tokenizer_config.json.
    code = [type(tokenizer).__name__, tokenizers.__version__, transformers.__version__]
    call = [tokenizer.truncation_side, getattr(tokenizer, "split_special_tokens", False)]
    settings = [CACHE_VERSION, of_type, max_length, tokenizer_state(tokenizer), code, call]
    digest = hashlib.sha256(json.dumps(settings).encode("utf-8"))
    items = rows.items
    for column in (rows.texts, rows.pair_texts, None if items is None else items.texts):
        digest.update(f" {None if column is None else len(column)} ".encode())
        for text in () if column is None else json_pieces(column):
            digest.update(text)
    if items is not None:
        digest.update(items.offsets.astype("<i8").data)
    return digest.hexdigest()[:32]


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the settings that decide how a tokenizer splits texts, as JSON.

    Truncation and padding are left out, since every call sets them.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):
        model.pop(state, None)
    return model


def json_pieces(texts: Sequence[str]) -> Iterator[bytes]:
    """Yield json.dumps(list(texts)) in pieces, without the brackets."""
    for start in range(0, len(texts), _TEXTS):
        piece = json.dumps(list(texts[start : start + _TEXTS]))[1:-1]
        yield (f", {piece}" if start else piece).encode("utf-8")


def array_pieces(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of an array in order. The memory of a memory-mapped array is freed again."""
    rows = max(1, _BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).data
        if start // rows % 64 == 63:
            free_pages(array)
    free_pages(array)


def free_pages(array: np.ndarray) -> None:
    """Remove the pages of a memory-mapped array from the process's memory.

    The next access reads them again. Other arrays, and those that can be written, are left alone.
    """
    base: Any = None if array.flags.writeable else array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
