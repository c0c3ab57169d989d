"""Token ids equal the tokenizer's; the cache returns them unchanged."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastmtl.config import TaskConfig
from fastmtl.data import tokenized
from fastmtl.data.rows import Rows
from fastmtl.data.token_cache import load_entry
from fastmtl.data.tokenized import check_token_types, tokenize
from fastmtl.data.types import single
from fastmtl.errors import UserError

TEXTS, OTHERS = ["the cat sat", "a very long story about the dog and the house"], ["it ran", "so do we"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


def rows(pairs: bool = True) -> Rows:
    return Rows(Path("f.csv"), ["x", "y"], TEXTS, OTHERS if pairs else None, np.array([0.0, 1.0], np.float32))


def config(pairs: str = "cross") -> TaskConfig:
    return TaskConfig.model_validate({"type": "binary", "data": {}, "pairs": pairs})


def sequence(data: tokenized.TokenizedDataset, index: int) -> list[int]:
    return data.tokens[data.offsets[index] : data.offsets[index + 1]].tolist()


def test_cross_encoded_pairs(tokenizer: Any, tmp_path: Path) -> None:
    data = tokenize(rows(), tokenizer, config(), 64, tmp_path)
    for index in range(2):
        expected = tokenizer(TEXTS[index], OTHERS[index])
        assert sequence(data, index) == expected["input_ids"]
        assert data.second_text[index] == expected["token_type_ids"].index(1)
    assert data.truncated == 0 and data.lengths.tolist() == np.diff(data.offsets).tolist()


def test_bi_encoded_pairs(tokenizer: Any, tmp_path: Path) -> None:
    data = tokenize(rows(), tokenizer, config("bi"), 64, tmp_path)
    texts = [TEXTS[0], OTHERS[0], TEXTS[1], OTHERS[1]]
    assert [sequence(data, k) for k in range(4)] == tokenizer(texts)["input_ids"]
    assert len(data) == 2 and data.lengths.sum() == len(data.tokens)
    assert (data.second_text == np.diff(data.offsets)).all()


@pytest.mark.parametrize("pairs", ["cross", "bi"])
def test_take(pairs: str, tokenizer: Any, tmp_path: Path) -> None:
    data = tokenize(rows(), tokenizer, config(pairs), 64, tmp_path)
    taken = data.take(np.array([1, 0, 1]))
    per_example = data.sequences_per_example
    for index, row in enumerate((1, 0, 1)):
        for k in range(per_example):
            assert sequence(taken, index * per_example + k) == sequence(data, row * per_example + k)
            assert taken.second_text[index * per_example + k] == data.second_text[row * per_example + k]
    assert taken.ids == ["y", "x", "y"] and taken.labels.tolist() == [1.0, 0.0, 1.0]
    assert taken.lengths.tolist() == data.lengths[[1, 0, 1]].tolist()
    assert len(data.take(np.zeros(0, np.int64))) == 0


def test_long_pairs_are_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    data = tokenize(rows(), tokenizer, config(), 14, tmp_path)
    assert data.truncated == 1 and data.lengths.max() == 14
    cut = tokenizer(TEXTS[1], OTHERS[1], truncation="longest_first", max_length=14)
    assert sequence(data, 1) == cut["input_ids"]
    empty = dataclasses.replace(rows(), pair_texts=["", ""])
    data = tokenize(empty, tokenizer, config(), 7, tmp_path)
    assert sequence(data, 0)[-2:] == sequence(data, 1)[-2:] == [tokenizer.sep_token_id] * 2


def test_single_texts_cannot_be_bi_encoded(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pairs: bi needs two texts"):
        tokenize(rows(pairs=False), tokenizer, config("bi"), 64, tmp_path)


def test_cache_is_used_and_keyed_by_everything(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(rows(), tokenizer, config(), 64, tmp_path)
    tokenize(rows(pairs=False), tokenizer, config(), 64, tmp_path)
    tokenize(rows(), tokenizer, config(), 14, tmp_path)  # truncation changes the tokenizer, not the key
    tokenize(rows(), tokenizer, config(), 64, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3

    def refuse(*arguments: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(single, "encode_sequences", refuse)
    again = tokenize(rows(), tokenizer, config(), 64, tmp_path)
    assert isinstance(again.tokens, np.memmap)
    assert again.tokens.tolist() == first.tokens.tolist()


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "meta.json"])
def test_damaged_cache_is_made_again(tokenizer: Any, tmp_path: Path, name: str) -> None:
    first = tokenize(rows(), tokenizer, config(), 64, tmp_path).tokens.tolist()
    entry = next(tmp_path.iterdir())
    (entry / name).write_bytes((entry / name).read_bytes()[:-3])
    assert tokenize(rows(), tokenizer, config(), 64, tmp_path).tokens.tolist() == first
    assert load_entry(entry) is not None


def test_cache_that_cannot_be_written(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    data = tokenize(rows(), tokenizer, config(), 64, tmp_path / "file" / "cache")
    assert sequence(data, 0) == tokenizer(TEXTS[0], OTHERS[0])["input_ids"]
    tokenize(rows(), tokenizer, config(), 14, tmp_path / "file" / "cache")
    assert capsys.readouterr().err.count("is not writable") == 1


def test_the_tokenizer_keeps_its_own_truncation_and_padding(tokenizer: Any, tmp_path: Path) -> None:
    plain = tokenizer.backend_tokenizer.to_str()
    tokenize(rows(), tokenizer, config(), 14, tmp_path)
    assert tokenizer.backend_tokenizer.to_str() == plain  # without the cache; texts were truncated
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.enable_truncation(9, direction="left")
    own.backend_tokenizer.enable_padding(length=9)
    before = own.backend_tokenizer.to_str()
    for length in (64, 14, 64):  # the last from the cache; tokens do not change
        data = tokenize(rows(), own, config(), length, tmp_path / "own")
        assert data.tokens.tolist() == tokenize(rows(), tokenizer, config(), length, tmp_path).tokens.tolist()
    own.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text("utf-8")) == json.loads(before)


def test_token_types_of_a_tokenizer_that_does_not_name_them(tokenizer: Any, tmp_path: Path) -> None:
    unnamed = copy.deepcopy(tokenizer)
    unnamed.model_input_names = ["input_ids", "attention_mask"]
    for length in (64, 14):
        data = tokenize(rows(), unnamed, config(), length, tmp_path / "unnamed")
        same = tokenize(rows(), tokenizer, config(), length, tmp_path)
        assert data.second_text.tolist() == same.second_text.tolist()
        assert (data.second_text < np.diff(data.offsets)).all()


def test_an_encoder_with_one_token_type(tokenizer: Any, tmp_path: Path) -> None:
    pairs = tokenize(rows(), tokenizer, config(), 64, tmp_path)
    check_token_types([pairs, None], 2)
    check_token_types([tokenize(rows(), tokenizer, config("bi"), 64, tmp_path)], 1)
    with pytest.raises(UserError, match="f.csv: its pairs need two token types, and the encoder has 1"):
        check_token_types([None, pairs], 1)


@pytest.mark.parametrize("change", ["side", "special", "added", "normalizer", "template", "tokenizers", "transformers"])
def test_two_tokenizers_that_differ_in_one_thing(
    change: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(rows(), tokenizer, config(), 14, tmp_path)
    other = copy.deepcopy(tokenizer)
    match change:
        case "side":
            other.truncation_side = "left"
        case "special":
            other.split_special_tokens = True
        case "added":
            other.add_tokens(["cat sat"])
        case "normalizer":
            from tokenizers.normalizers import BertNormalizer

            other.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
        case "template":
            from tokenizers.processors import TemplateProcessing

            marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
            other.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A", "[CLS] $A $B:1", marks)
        case _:
            monkeypatch.setattr(f"{change}.__version__", "0.0")
    data = tokenize(rows(), other, config(), 14, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    if change == "side":
        cut = other(TEXTS[1], OTHERS[1], truncation="longest_first", max_length=14)
        assert sequence(data, 1) == cut["input_ids"] != tokenizer(TEXTS[1], OTHERS[1])["input_ids"][:14]


def test_token_types_that_no_batch_can_hold(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing("$A:2", "$A:1 $B:0", [])
    for pairs in (True, False):
        with pytest.raises(UserError, match="token types other than 0 for a first text"):
            tokenize(rows(pairs), other, config(), 64, tmp_path)
