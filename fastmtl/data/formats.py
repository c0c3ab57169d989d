"""Known file layouts: the columns of the id, the texts and the label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastmtl.errors import UserError, listed, unknown_name


@dataclass(frozen=True)
class Layout:
    """The columns of a file, each by name or by number from 0.

    others: names of further columns that the file may have; they are not read. labels: the class id
    of each label text. header: whether line 1 names the columns. indicators: columns of one label
    each, which replace the column `label`.
    """

    text: str | int
    label: str | int
    text_pair: str | int | None = None
    id: str | int | None = None
    others: frozenset[str] = frozenset()
    labels: Mapping[str, int] = field(default_factory=dict)
    header: bool = True
    indicators: tuple[str | int, ...] = ()

    @property
    def columns(self) -> dict[str, str | int]:
        named = {"id": self.id, "text": self.text, "text_pair": self.text_pair, "label": self.label}
        return {role: column for role, column in named.items() if column is not None}

    @property
    def label_columns(self) -> tuple[str | int, ...]:
        return self.indicators or (self.label,)

    def fits(self, header: list[str]) -> bool:
        """Return whether a header names the text columns of this layout and no unknown column."""
        texts = {self.text} if self.text_pair is None else {self.text, self.text_pair}
        return self.header and texts <= set(header) <= {*self.columns.values(), *self.others, *_ROW_NUMBERS}


# The names that pandas gives to its column of row numbers.
_ROW_NUMBERS = ("", "Unnamed: 0")


def _others(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Stanford CS224N's default project: tab-separated, an unnamed first column with a row number, CSV
# quotes.
CS224N = {
    "SST, CFIMDB": Layout(id="id", text="sentence", label="sentiment"),
    "Quora": Layout(id="id", text="sentence1", text_pair="sentence2", label="is_duplicate"),
    "STS": Layout(id="id", text="sentence1", text_pair="sentence2", label="similarity"),
}
# https://gluebenchmark.com: tab-separated, quotes are part of the text. The class ids are those of
# the baseline models that GLUE's authors published.
_ENTAILMENT = {"entailment": 0, "not_entailment": 1}
_PARSES = _others("sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse")
GLUE = {
    "SST-2": Layout(id="index", text="sentence", label="label"),  # and the test file of CoLA
    "CoLA": Layout(text=3, label=1, header=False),  # source, label, the author's mark, sentence
    "QQP": Layout(id="id", text="question1", text_pair="question2", label="is_duplicate", others=_others("qid1 qid2")),
    "STS-B": Layout(
        id="index",
        text="sentence1",
        text_pair="sentence2",
        label="score",
        others=_others("genre filename year old_index source1 source2"),
    ),
    "MRPC": Layout(
        id="index", text="#1 String", text_pair="#2 String", label="Quality", others=frozenset({"#1 ID", "#2 ID"})
    ),
    "MNLI": Layout(
        id="pairID",
        text="sentence1",
        text_pair="sentence2",
        label="gold_label",
        others=_PARSES | _others("index promptID genre label1 label2 label3 label4 label5"),
        labels={"entailment": 0, "neutral": 1, "contradiction": 2},
    ),
    "QNLI": Layout(id="index", text="question", text_pair="sentence", label="label", labels=_ENTAILMENT),
    "RTE, WNLI": Layout(id="index", text="sentence1", text_pair="sentence2", label="label", labels=_ENTAILMENT),
}
FORMATS = {"cs224n": CS224N, "glue": GLUE, "table": {}}


def check_format(name: str, formats: Iterable[str]) -> None:
    """Raise UserError for a format that is not one of `formats`, those of the task's type."""
    if name not in formats:
        raise unknown_name("data format", name, formats)


def is_quoted(name: str, delimiter: str) -> bool:
    """Return whether files of the format `name` have CSV quotes by default.

    Tables have quotes with commas and none with tabs: the definition of the media type
    text/tab-separated-values has no quotes.
    """
    return name == "cs224n" or (name != "glue" and delimiter == ",")


def has_header(name: str, first: list[str]) -> bool:
    """Return whether line 1 of a file names the columns; it does in all formats except CoLA's.

    name: the format. first: the cells of line 1.
    """
    return name != "glue" or any(layout.fits(first) for layout in GLUE.values()) or not _is_cola(first)


def _is_cola(cells: list[str]) -> bool:
    return len(cells) == 4 and cells[1] in ("0", "1") and cells[2] in ("", "*")


def find_layout(name: str, header: list[str], columns: Mapping[str, str | int], path: str) -> Layout:
    """Return the layout of a file from its format `name` and its header.

    columns: the recipe's `columns`. They override columns of a known layout; for format `table`
    they are the layout. Raises UserError naming the file if no layout of the format fits.
    """
    if name == "table":
        if "text" not in columns:
            raise UserError(
                f"{path}: format 'table' needs data.columns with at least text (and label); it has {dict(columns)}"
            )
        return Layout(
            text=columns["text"],
            text_pair=columns.get("text_pair"),
            label=columns.get("label", "label"),
            id=columns.get("id"),
        )
    overrides: dict[str, Any] = dict(columns)
    if name == "glue" and not any(header):
        return replace(GLUE["CoLA"], **overrides)
    fitting = [layout for layout in FORMATS[name].values() if layout.fits(header)]
    fitting.sort(key=lambda layout: layout.label not in header)  # without a label column (test files) the texts decide
    if fitting:
        return replace(fitting[0], **overrides)
    known = "; ".join(listed(layout.columns.values()) for layout in FORMATS[name].values())
    raise UserError(
        f"{path}, line 1: the header ({listed(filter(None, header))}) is no {name} layout. Known: {known}. "
        "For other columns write format: table and a data.columns mapping."
    )
