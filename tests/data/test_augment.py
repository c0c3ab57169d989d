"""Easy data augmentation on a WordNet of four synsets in the format of wndb(5WN)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastmtl.config import AugmentConfig, TaskConfig
from fastmtl.data.augment import augment, change, missing_rows
from fastmtl.data.rows import Rows
from fastmtl.data.wordnet import PARTS_OF_SPEECH, WordNet, find_wordnet
from fastmtl.errors import UserError

SYNSETS: dict[str, list[tuple[str, ...]]] = {
    "noun": [("film", "movie", "motion_picture"), ("film", "layer"), ("car", "auto")],
    "verb": [("film", "shoot")],
    "adj": [("big", "large(a)")],
    "adv": [],
}
LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"


@pytest.fixture
def wordnet_files(tmp_path: Path) -> Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part in PARTS_OF_SPEECH:
        data = LICENCE
        offsets: dict[str, list[int]] = {}
        for words in SYNSETS[part]:
            for word in words:
                offsets.setdefault(word.partition("(")[0], []).append(len(data))
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{len(data):08d} 10 n {len(words):02x} {listed} 001 @ 00001740 n 0000 | a gloss\n"
        index = LICENCE
        for lemma, where in sorted(offsets.items()):
            places = " ".join(f"{offset:08d}" for offset in where)
            index += f"{lemma} n {len(where)} 2 @ ~ {len(where)} 1 {places}  \n"
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
    return folder


def test_synonyms_of_all_synsets_and_parts_of_speech(wordnet_files: Path, tmp_path: Path) -> None:
    found = WordNet(wordnet_files)
    assert found.synonyms("film") == ("layer", "motion picture", "movie", "shoot")
    assert found.synonyms("large") == ("big",) and found.synonyms("motion picture") == ("film", "movie")
    assert found.synonyms("house") == ()
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for file in wordnet_files.iterdir():
            archive.write(file, f"wordnet/{file.name}")
    zipped = WordNet(tmp_path / "wordnet.zip")
    assert zipped.synonyms("film") == found.synonyms("film") and zipped.version == found.version


def test_the_files_are_found_or_the_message_says_how_to_get_them(
    wordnet_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmtl.data.wordnet._places", lambda: [tmp_path / "absent", wordnet_files])
    assert find_wordnet(None).synonyms("auto") == ("car",)
    monkeypatch.setattr("fastmtl.data.wordnet._places", lambda: [tmp_path / "absent"])
    with pytest.raises(UserError, match="apt install wordnet-base.*nltk.downloader wordnet"):
        find_wordnet(None)
    with pytest.raises(UserError, match="not WordNet's files: data.noun cannot be read"):
        find_wordnet(str(tmp_path))


def only(**shares: float) -> AugmentConfig:
    return AugmentConfig(**{"synonyms": 0, "insertions": 0, "swaps": 0, "deletions": 0, **shares})  # type: ignore[arg-type]


def test_each_operation(wordnet_files: Path) -> None:
    wordnet, text = WordNet(wordnet_files), 'the "film" was a big one, and the house too'
    words = text.split()

    def texts(config: AugmentConfig) -> list[list[str]]:
        return [change(text, config, wordnet, np.random.default_rng(seed)).split() for seed in range(200)]

    assert texts(only()) == [words] * 200
    replaced = {" ".join(new) for new in texts(only(synonyms=0.1))}  # one of ten words
    film = {f'the "{word}" was a big one, and the house too' for word in ("layer", "motion picture", "movie", "shoot")}
    assert replaced == film | {'the "film" was a large one, and the house too'}
    for new in texts(only(insertions=0.2)):  # two insertions, of one word or two
        rest = iter(new)
        assert all(word in rest for word in words) and 12 <= len(new) <= 14  # the text's own words stay in order
    assert all(sorted(new) == sorted(words) for new in texts(only(swaps=0.3)))
    assert any(new != words for new in texts(only(swaps=0.3)))
    deleted = texts(only(deletions=0.3))
    assert np.mean([len(new) for new in deleted]) == pytest.approx(7, abs=0.4)
    assert all(new for new in texts(only(deletions=0.99)))


def test_every_class_grows_to_the_largest() -> None:
    labels = np.array([0] * 10 + [1] * 4 + [2] * 3)
    chosen = missing_rows(labels, 0)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [0, 6, 7]
    counts = np.bincount(chosen, minlength=17)
    assert counts[10:14].max() - counts[10:14].min() == 1 and counts[14:].max() - counts[14:].min() == 1
    assert missing_rows(labels, 0) == chosen != missing_rows(labels, 1)


def test_new_rows_follow_from_the_seed_and_are_kept(
    wordnet_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"a big car number {row}" for row in range(6)]
    labels = np.array([0, 1, 1, 1, 1, 0])
    rows = Rows(tmp_path, [f"r{row}" for row in range(6)], texts, list(reversed(texts)), labels)
    config = AugmentConfig(wordnet=str(wordnet_files))
    made = augment(rows, config, 3, tmp_path / "cache")
    assert made.labels is not None and np.bincount(made.labels).tolist() == [4, 4]
    assert made.texts[:6] == texts and set(made.ids[6:]) == {"r0+1", "r5+1"}
    assert made.pair_texts is not None and all(new not in texts for new in made.texts[6:])
    assert made.notes == ["2 rows made by augmentation"]
    again, other = (augment(rows, config, seed, tmp_path / "other") for seed in (3, 4))
    assert again.texts == made.texts and again.pair_texts == made.pair_texts and other.texts != made.texts

    def never(*_: object) -> None:
        raise AssertionError("it was to be found in the cache")

    monkeypatch.setattr("fastmtl.data.augment._make", never)
    assert augment(rows, config, 3, tmp_path / "cache").texts == made.texts


def test_regression_has_no_classes() -> None:
    values = {"type": "regression", "range": [0, 5], "data": {"augment": {}}}
    with pytest.raises(ValueError, match="a regression task has none"):
        TaskConfig.model_validate(values)
