"""Files that are too large for memory: the same rows and tokens as in memory, in pieces."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from fastmtl.config import DataConfig, TaskConfig
from fastmtl.data import columnar, display, file_bytes, spill, tokenized
from fastmtl.data.cells import repeated_ids
from fastmtl.data.filters import drop_longest
from fastmtl.data.readers import read_rows
from fastmtl.data.rows import Rows
from fastmtl.data.text_column import NumberColumn, TextBuilder, TextColumn, joined, taken
from fastmtl.data.token_cache import free_pages
from fastmtl.data.tokenized import TokenizedDataset, tokenize
from fastmtl.data.types import DATA_TYPES
from fastmtl.errors import UserError

WORDS = "the cat sat on a very long red road and ate good food with an old dog in the city".split()
ROWS = 23


def text(row: int, words: int | None = None) -> str:
    count = 3 + row % 9 if words is None else words
    return " ".join(WORDS[(row + word) % len(WORDS)] for word in range(count)) + (" é" if row % 4 == 0 else "")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.name


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return path.name


def case(kind: str, folder: Path) -> dict[str, Any]:
    """Write a file of the task type and return the task's settings."""
    rows = range(ROWS)
    columns = {"text": "text", "label": "label"}
    match kind:
        case "classification":
            lines = [f'"{text(row)}\nso",{row % 3},{row // 2}' for row in rows]  # two rows with each id
            name = write(folder / "rows.csv", "text,label,id\n" + "\n".join(lines) + "\n,0,x\n")
            return {"num_labels": 3, "data": {"train": name, "columns": {**columns, "id": "id"}}}
        case "binary":
            pairs = [{"text": text(row), "other": text(row + 5), "label": row % 2} for row in rows]
            name = write_parquet(folder / "rows.parquet", pairs)
            return {"pairs": "bi", "data": {"train": name, "columns": {**columns, "text_pair": "other"}}}
        case "regression":
            name = write_lines(folder / "rows.jsonl", [{"text": text(row), "label": row / 7} for row in rows])
            return {"range": [0, 5], "data": {"train": name, "columns": columns}}
        case "multilabel":
            lines = [f"{text(row)}\t{'a;b' if row % 3 else ''}" for row in rows]
            data = {"train": write(folder / "rows.tsv", "\n".join(["text\tlabel", *lines])), "columns": columns}
            return {"label_names": ["a", "b"], "multilabel": {"separator": ";"}, "data": data}
        case "tokens":
            words = [word for row in rows for word in [*text(row).split(), ""]]
            tagged = "".join(f"{word} {'B-X' if word == 'cat' else 'O'}\n" if word else "\n" for word in words)
            name = write(folder / "rows.conll", tagged)
            return {"label_names": ["O", "B-X", "I-X"], "data": {"train": name}}
        case "span":
            asked = [
                {"id": f"q{row}", "question": text(row, 3), "context": text(row, 30), "answers": answer(text(row, 30))}
                for row in rows
            ]
            data = {"train": write_lines(folder / "rows.jsonl", asked), "format": "squad"}
            return {"span": {"stride": 2, "max_question": 3}, "data": data}
        case "choice" | "ranking":
            label = {"choice": lambda row: row % 2, "ranking": lambda row: [row % 3, 1, 0][: 2 + row % 2]}[kind]
            several = [
                {"text": text(row, 4), "choices": [text(row + k) for k in range(2 + row % 2)], "label": label(row)}
                for row in rows
            ]
            roles = {"text": "text", "choices": "choices", "label": "label"}
            return {"data": {"train": write_lines(folder / "rows.jsonl", several), "columns": roles}}
    raise AssertionError(f"a file of type {kind}")


def answer(context: str) -> dict[str, list[Any]]:
    return {"text": [context.split()[4]], "answer_start": [context.index(context.split()[4])]}


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every text go to a temporary file, and everything be read and tokenised in pieces."""
    monkeypatch.setattr(spill, "IN_MEMORY", 160)
    for module in (spill, file_bytes):
        monkeypatch.setattr(module, "PIECE", 61)
    monkeypatch.setattr(columnar, "BATCH", 4)
    monkeypatch.setattr(tokenized, "PIECE_ROWS", 5)
    monkeypatch.setattr(tokenized, "PIECE_CHARACTERS", 120)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


def prepared(task: TaskConfig, folder: Path, cache: Path, tokenizer: Any) -> tuple[Rows, TokenizedDataset]:
    data = DataConfig(dir=str(folder), cache_dir=str(cache), on_bad_row="skip")
    rows = drop_longest(read_rows(task, data, "train"), 0.1)
    return rows, tokenize(rows, tokenizer, task, 10, cache, keep_rows=True)


@pytest.mark.parametrize("kind", DATA_TYPES)
def test_pieces_equal_the_whole(kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TaskConfig.model_validate({"type": kind, **case(kind, tmp_path)})
    rows, whole = prepared(task, tmp_path, tmp_path / "whole", tokenizer)
    assert isinstance(rows.texts, list)
    make_small(monkeypatch)
    again, pieces = prepared(task, tmp_path, tmp_path / "pieces", tokenizer)
    large = again.texts if again.items is None else again.items.texts
    assert isinstance(large, TextColumn)
    for name in ("ids", "texts", "pair_texts", "skipped", "notes", "answers"):
        one, other = getattr(rows, name), getattr(again, name)
        assert one == (None if other is None else list(other)), name
    assert rows.items is None or again.items is None or list(again.items.texts) == rows.items.texts
    assert files_in(tmp_path / "pieces") == files_in(tmp_path / "whole")  # names, arrays and number of truncated rows
    assert pieces.digest() == whole.digest()
    assert pieces.truncated == whole.truncated and (whole.truncated or kind == "span")
    chosen = np.array([9, 2, 17])
    assert pieces.take(chosen).digest() == whole.take(chosen).digest()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_interruption_leaves_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TaskConfig.model_validate({"type": "regression", **case("regression", tmp_path)})
    kind, calls = DATA_TYPES["regression"], iter(range(3))

    def interrupted(rows: Rows, tokenizer: Any, task: TaskConfig, max_length: int) -> tuple[dict[str, np.ndarray], int]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return kind.encode(rows, tokenizer, task, max_length)

    make_small(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(
            tokenized,
            "DATA_TYPES",
            {"regression": tokenized.dataclasses.replace(DATA_TYPES["regression"], encode=interrupted)},
        )
        with pytest.raises(KeyboardInterrupt):
            prepared(task, tmp_path, tmp_path / "cache", tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []
    killed, running = tmp_path / "cache" / ".making-a", tmp_path / "cache" / ".making-b"
    for folder in (killed, running):
        folder.mkdir()
        (folder / "tokens.npy").touch()
        os.utime(folder, (0, 0))
    os.utime(killed / "tokens.npy", (0, 0))
    prepared(task, tmp_path, tmp_path / "cache", tokenizer)
    assert not killed.exists() and running.exists() and len(list((tmp_path / "cache").glob("tokens-*"))) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_is_shown(
    terminal: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TaskConfig.model_validate({"type": "regression", **case("regression", tmp_path)})
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    prepared(task, tmp_path, tmp_path / "small", tokenizer)
    assert capsys.readouterr().err == ""
    make_small(monkeypatch)
    prepared(task, tmp_path, tmp_path / "large", tokenizer)
    shown = capsys.readouterr().err
    assert ("21/21 rows" if terminal else "fastmtl: 21 of 21 rows of rows.jsonl tokenised\n") in shown
    assert "\x1b" in shown if terminal else shown.count("\n") > 4


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TaskConfig.model_validate({"type": "regression", **case("regression", tmp_path)})

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_small(monkeypatch)
    monkeypatch.setattr(os, "pwrite", full)
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=f"data.cache_dir={cache}: cannot write .* No space left on device"):
        read_rows(task, DataConfig(dir=str(tmp_path), cache_dir=str(cache)), "train")


def test_columns_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY", 1000)
    texts = [text(row) * (row % 3) for row in range(200)]
    builder = TextBuilder()
    builder.extend(texts)
    column = builder.done()
    assert isinstance(column, TextColumn) and len(column) == 200 and list(column) == texts
    assert (column[0], column[-1], column[3:190:7], column[5:2]) == (texts[0], texts[-1], texts[3:190:7], [])
    with pytest.raises(IndexError):
        column[200]
    positions = np.random.default_rng(0).permutation(200)[:60]
    for chosen in (positions, np.arange(40, 90), positions[:0], np.array([199, 0])):
        part = taken(column, chosen)
        assert list(part) == [texts[row] for row in chosen] and len(part) == len(chosen)
        assert part[:9] == [texts[row] for row in chosen[:9]]
    assert list(joined([taken(column, positions), ["x"]])) == [*(texts[row] for row in positions), "x"]
    numbers = joined([NumberColumn(range(3, 6)), NumberColumn(np.array([9]))])
    assert (
        isinstance(numbers, NumberColumn) and list(numbers) == ["3", "4", "5", "9"] and numbers[1:] == ["4", "5", "9"]
    )


def test_repeated_ids_are_found_among_equal_hashes(tmp_path: Path) -> None:
    class Same(str):
        def __hash__(self) -> int:
            return 7

    assert repeated_ids(tmp_path, [Same("a"), Same("b"), "c"], [2, 3, 4]) == []
    (note,) = repeated_ids(tmp_path, [Same("a"), Same("b"), "c", Same("b"), Same("a")], [2, 3, 4, 5, 6])
    assert "2 rows have an id that an earlier row has too, the first is 'b' in line 5 and line 3" in note


def test_freed_pages_can_be_read_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5000))
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert array.sum() == 12497500
    free_pages(array[10:])
    free_pages(np.arange(3))
    assert array.sum() == 12497500
