"""Known file layouts: which columns hold the id, the texts and the label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastmtl.errors import UserError, listed, unknown_name


@dataclass(frozen=True)
class Layout:
    """Column names; `labels` maps label texts of the layout to class ids; `quoted`: cells may be in CSV quotes."""

    text: str | int
    label: str | int
    text_pair: str | int | None = None
    id: str | int | None = None
    quoted: bool = True
    labels: Mapping[str, int] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, str | int]:
        named = {"id": self.id, "text": self.text, "text_pair": self.text_pair, "label": self.label}
        return {role: column for role, column in named.items() if column is not None}


# Stanford CS224N's default project: tab-separated, an unnamed first column with a row number, CSV quotes.
CS224N = (
    Layout(id="id", text="sentence", label="sentiment"),
    Layout(id="id", text="sentence1", text_pair="sentence2", label="is_duplicate"),
    Layout(id="id", text="sentence1", text_pair="sentence2", label="similarity"),
)
# https://gluebenchmark.com: tab-separated, quotes are part of the text.
GLUE = (
    Layout(text="sentence", label="label", quoted=False),  # SST-2
    Layout(id="id", text="question1", text_pair="question2", label="is_duplicate", quoted=False),  # QQP
    Layout(id="index", text="sentence1", text_pair="sentence2", label="score", quoted=False),  # STS-B
    Layout(text="#1 String", text_pair="#2 String", label="Quality", quoted=False),  # MRPC
    Layout(
        id="pairID",
        text="sentence1",
        text_pair="sentence2",
        label="gold_label",
        quoted=False,
        labels={"entailment": 0, "neutral": 1, "contradiction": 2},  # the order of GLUE's own baselines
    ),  # MNLI
)
FORMATS = {"cs224n": CS224N, "glue": GLUE, "table": ()}


def is_quoted(name: str) -> bool:
    """Whether files of this format use CSV quotes. Raises UserError for a name that is no format."""
    if name not in FORMATS:
        raise unknown_name("data format", name, FORMATS)
    return name != "glue"


def find_layout(name: str, header: list[str], columns: Mapping[str, str | int], path: str) -> Layout:
    """The layout of a file with this header; `columns` overrides or, for `table`, defines it.

    Raises UserError naming the file when no layout of the format fits.
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
    texts = [layout for layout in FORMATS[name] if _holds(header, layout.text) and _holds(header, layout.text_pair)]
    labelled = [layout for layout in texts if _holds(header, layout.label)]
    for layout in labelled or texts:  # without a label column (test files) the texts decide
        return Layout(**{**vars(layout), **columns}) if columns else layout
    known = "; ".join(", ".join(map(str, layout.columns.values())) for layout in FORMATS[name])
    raise UserError(
        f"{path}, line 1: the header ({listed(filter(None, header))}) is no {name} layout. Known: {known}. "
        "For other columns write format: table and a data.columns mapping."
    )


def _holds(header: list[str], column: str | int | None) -> bool:
    return column is None or column in header
