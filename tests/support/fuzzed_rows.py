"""Random tasks, and rows for their files, each with a reader's expected outcome."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from fastmtl.config import TaskConfig

Outcome = Literal["good", "bad", "either"]
NAMES = [None, ["neg", "pos"], ["1", "2", "3"], ["x, y", 'a "b"', "é"], ["true", "false"], ["0", "0.5"]]
WORDS = ["fine", "film", "été", "naïve ☃", "\U0001f600", "a, b", "1", "0", "x;y", "it's", "{", "[", "\\", "#", "None"]
# Spaces of every kind: a reader that splits lines at other characters than line feeds loses rows.
SPACES = [" ", "  ", "\u00a0", "\u2028", "\x0b", "\x0c", "\x1c", "\x85", " \t "]
BAD_LABELS = ["", " ", "nope", "-1", "99", "1_0", "nan", "inf", "1e400", "0.25x", "٣", "1,0", "maybe\x00"]


@dataclass
class Row:
    """A written row. values: by column. line: its first line in the file, or Parquet's number."""

    values: dict[str, Any]
    outcome: Outcome = "good"
    why: str = ""
    text: str = ""
    label: float | int | None = None
    line: int = 0


class Draw:
    """The task of a file, and its rows one by one."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.style = random.choice(["csv", "csv", "tsv", "tsv", "jsonl", "parquet"])
        self.format = (
            "table" if self.style in ("jsonl", "parquet") else random.choice(["table"] * 4 + ["cs224n", "glue"])
        )
        self.delimiter = "\t" if self.style == "tsv" or self.format != "table" else ","
        self.kind = random.choice(["binary", "classification", "regression"])
        self.names = random.choice(NAMES) if self.kind == "classification" else None
        self.classes = len(self.names) if self.names else 2 if self.kind == "binary" else random.randint(2, 5)
        self.require_labels = random.random() < 0.8
        self.has_pair, self.has_id = random.random() < 0.4, random.random() < 0.4
        self._columns()
        setting = random.choice([None, None, "csv", "none"]) if self.delimited else None
        self.quotes_setting = setting
        default = self.format == "cs224n" or (self.format == "table" and self.delimiter == ",")
        self.quoted = setting == "csv" or (setting is None and default)
        self.tabs = False  # a tab in a text of a file with commas and no header
        self.task = self._task()

    @property
    def delimited(self) -> bool:
        return self.style in ("csv", "tsv")

    def _columns(self) -> None:
        """Draw roles and names of columns, in the file's order, and the number of unused ones."""
        random = self.random
        self.header = True
        if self.format == "table":
            roles = {"text": "text", "label": random.choice(["label", "Étiquette", "my label"])}
            roles |= {"text_pair": "second"} if self.has_pair else {}
            roles |= {"id": "key"} if self.has_id else {}
            order = [*roles.values(), *random.sample(["extra", "more", ""], random.randint(0, 2))]
            random.shuffle(order)
            self.by_number = self.delimited and random.random() < 0.3
            self.header = not (self.by_number and random.random() < 0.5)
        elif self.format == "cs224n":
            pair = {"id": "id", "text": "sentence1", "text_pair": "sentence2", "label": "similarity"}
            roles = pair if self.has_pair else {"id": "id", "text": "sentence", "label": "sentiment"}
            order, self.by_number, self.has_id = ["", *roles.values()], False, True
        else:
            pair = {"id": "index", "text": "sentence1", "text_pair": "sentence2", "label": "score"}
            roles = pair if self.has_pair else {"id": "index", "text": "sentence", "label": "label"}
            order, self.by_number, self.has_id = list(roles.values()), False, True
        self.roles, self.order = roles, order

    def _task(self) -> TaskConfig:
        data: dict[str, Any] = {"format": self.format, "quotes": self.quotes_setting}
        if self.format == "table":
            numbers = {role: self.order.index(column) for role, column in self.roles.items()}
            data["columns"] = numbers if self.by_number else self.roles
            if self.by_number:
                data["header"] = self.header
        values: dict[str, Any] = {"type": self.kind, "data": data}
        if self.kind == "classification":
            values |= {"label_names": self.names} if self.names else {"num_labels": self.classes}
        if self.kind == "regression":
            values["range"] = (0.0, 5.0)
        return TaskConfig.model_validate(values)

    def label(self) -> tuple[Any, float | int]:
        """Draw a cell and the label that it represents."""
        random = self.random
        if self.kind == "regression":
            value = random.choice([0, 5, 2.5, random.randint(0, 500) / 100])
            return random.choice([value, str(value), f" {value}", f"{value:e}"]), value
        index = random.randrange(self.classes)
        spellings: list[Any] = [self.names[index]] if self.names else []
        if self.names and self.names[index].isdigit():
            spellings += [int(self.names[index]), f"{self.names[index]}.0"]
        if not self.quoted and self.delimited:
            spellings = [name for name in spellings if "," not in str(name)]
        if self.names in (None, ["neg", "pos"], ["x, y", 'a "b"', "é"]):
            spellings += [index, str(index), f"{index}.0", float(index), f" {index} "]
            spellings += [("false", "true")[index], "FALSE True".split()[index]] if self.classes == 2 else []
        if self.style in ("jsonl", "parquet") and self.names is None and self.classes == 2:
            spellings.append(bool(index))
        return random.choice(spellings), index

    def text_of(self, limit: int = 6) -> str:
        """Draw a text with a word in it, and characters that may confuse a reader."""
        random = self.random
        parts = [random.choice(WORDS) for _ in range(random.randint(1, limit))]
        if random.random() < 0.3:
            parts.append(random.choice(['"', '""', 'so "good"', '"quoted"', "''"]))
        if not self.delimited or self.quoted:
            parts += random.choice([[], [], ["two\nlines"], ["a\r\nb"], ["\n\nblank"]])
        random.shuffle(parts)
        text = "".join(part + random.choice(SPACES) for part in parts)
        if "\n" in text:  # a line that looks like a row would rightly be refused
            text = text.replace(self.delimiter, ";")
        # After an open quote, a cell that begins with a line end would close it like a correct
        # cell.
        text = text if text[0] not in "\r\n" else f"so{text}"
        if self.delimited and self.delimiter == "," and not self.header and ("\n" in text or not self.tabs):
            text = text.replace("\t", " ")  # in most lines they would be delimiters
        if self.delimited and not self.quoted:
            text = text.replace(self.delimiter, " ").replace("\r", " ")
        return text

    def row(self, number: int, rows: int) -> Row:
        random = self.random
        written, label = self.label()
        self.tabs = number == 0 and rows > 3
        values = {column: random.choice(["", "0", "note"]) for column in self.order}
        row = Row(values, text=self.text_of(), label=label)
        values[self.roles["text"]], values[self.roles["label"]] = row.text, written
        if self.has_pair:
            values[self.roles["text_pair"]] = self.text_of(3)
        if self.has_id:
            values[self.roles["id"]] = f"row-{number}"
        row.text = " ".join(row.text.split())
        if random.random() < 0.15:
            random.choice([self._no_text, self._bad_label, self._zero_byte])(row)
        return row

    def _no_text(self, row: Row) -> None:
        column = self.roles[self.random.choice(["text", "text_pair"] if self.has_pair else ["text"])]
        row.values[column], row.outcome, row.why = self.random.choice(["", "  ", "\u00a0"]), "bad", "no text"

    def _bad_label(self, row: Row) -> None:
        bad = self.random.choice(BAD_LABELS)
        row.values[self.roles["label"]] = bad.replace(",", ";") if not self.quoted else bad
        row.outcome, row.why = ("bad" if self.require_labels else "good"), "label"
        if "\x00" in bad and self.delimited:
            row.outcome = "bad" if self.require_labels else "either"

    def _zero_byte(self, row: Row) -> None:
        row.values[self.roles["text"]] += "z\x00"
        row.text = " ".join(str(row.values[self.roles["text"]]).split())
        row.outcome, row.why = ("either" if self.delimited else "good"), "zero byte"  # Python 3.10's csv refuses it
