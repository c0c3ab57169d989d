"""Synonyms from WordNet's own files (Princeton; format: wndb(5WN)).

A line of index.<part of speech> is `lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt
tagsense_cnt offset...`. Each offset is the byte position of a line of data.<part of speech>, which
is `offset lex_filenum ss_type w_cnt word lex_id [word lex_id...] ...` with w_cnt in hex. All
distributions of WordNet have these two kinds of files. nltk's reader is not used: it needs further
files, which Debian's package lacks.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from fastmtl.errors import UserError
from fastmtl.files.user_path import user_path

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


class WordNet:
    """The synonyms of WordNet.

    directory: a folder with index.noun, data.noun and so on, or nltk's wordnet.zip. Raises
    UserError if the files are missing or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        read = _reader(directory)
        self._offsets: dict[str, list[tuple[str, int]]] = {}
        self._data = {part: read(f"data.{part}") for part in PARTS_OF_SPEECH}
        digest = hashlib.sha256()
        for part in PARTS_OF_SPEECH:
            digest.update(self._data[part])
            for line in read(f"index.{part}").decode("ascii").splitlines():
                if line.startswith(" "):  # the licence
                    continue
                lemma, _, synsets, pointers, *rest = line.split()
                for offset in rest[int(pointers) + 2 :][: int(synsets)]:
                    self._offsets.setdefault(lemma, []).append((part, int(offset)))
        self.version = digest.hexdigest()[:16]

    @functools.cache  # noqa: B019 - one object per run
    def synonyms(self, word: str) -> tuple[str, ...]:
        """Return the synonyms of a word, sorted; () for an unknown word.

        They are the other words of all synsets (sets of synonyms) that contain the word. word: a
        base form in lower case ("car", not "cars").
        """
        found: set[str] = set()
        for part, offset in self._offsets.get(word.replace(" ", "_"), ()):
            data = self._data[part]
            fields = data[offset : data.index(b"\n", offset)].decode("ascii").split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            # An adjective may end in "(p)", "(a)" or "(ip)", its position in a sentence.
            found.update(name.partition("(")[0].replace("_", " ").lower() for name in words)
        return tuple(sorted(found - {word}))


def find_wordnet(given: str | None) -> WordNet:
    """Load WordNet from the path `given`, or from the usual folders of Debian, WordNet and nltk.

    Raises UserError with instructions for the installation of WordNet.
    """
    return WordNet(wordnet_place(given))


def wordnet_place(given: str | None) -> Path:
    """Return the folder or zip archive that `find_wordnet(given)` reads.

    Raises UserError, if no place has WordNet, with instructions for the installation of WordNet.
    """
    if given is not None:
        return user_path(given)
    for place in _places():
        if _has_files(place):
            return place
    raise UserError(
        "augment: eda takes synonyms from WordNet, which is not installed. Install Debian's wordnet-base "
        "(apt install wordnet-base) or nltk's data (pip install nltk; python -m nltk.downloader wordnet), or set "
        "data.augment.wordnet of the task to a folder with index.noun, data.noun, ..."
    )


def _places() -> list[Path]:
    places = [Path(os.environ[name]) for name in ("WNSEARCHDIR",) if os.environ.get(name)]
    if os.environ.get("WNHOME"):
        places.append(Path(os.environ["WNHOME"]) / "dict")
    places.append(Path("/usr/share/wordnet"))
    nltk = [Path(path) for path in os.environ.get("NLTK_DATA", "").split(os.pathsep) if path]
    home = os.path.expanduser("~/nltk_data")  # unchanged without a home directory
    nltk += [Path(home), Path(sys.prefix) / "nltk_data", Path(sys.prefix) / "share" / "nltk_data"]
    nltk += [Path(path) / "nltk_data" for path in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    for path in nltk:
        places += [path / "corpora" / "wordnet", path / "corpora" / "wordnet.zip"]
    return places


def _has_files(place: Path) -> bool:
    return place.is_file() if place.suffix == ".zip" else (place / "index.noun").is_file()


def _reader(place: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            if place.suffix != ".zip":
                return (place / name).read_bytes()
            with zipfile.ZipFile(place) as archive:
                return archive.read(f"wordnet/{name}")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{place}: not WordNet's files: {name} cannot be read ({error})") from None

    return read
