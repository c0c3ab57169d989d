"""Check the prose of pages, docstrings and comments: python tools/check_prose.py [paths]

- A line of a page, a docstring or a comment has at most 100 columns. Tables, code and the targets
  of links do not count; ruff's W505 measures the lines of Python files.
- A docstring or a comment does not open with a word of OPENINGS, a docstring not with one of
  OF_DOCSTRINGS: prepositions and wh-words.

Without paths, every page and Python file under the current folder is checked, except the generated
docs/compile-table*.md. Each finding is a line `file:line: text`; a count per file follows.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

from checkout_files import checkout_files

ROOT = Path(__file__).parents[1]
COLUMNS = 100
OPENINGS = re.compile(r"(Of|In which|What|Whether|Which|How|Where|Who)\b")
# Docstrings open with a verb or a noun phrase; a comment may begin "As ..." or "With ...".
OF_DOCSTRINGS = re.compile(
    OPENINGS.pattern + r"|(After|Also|As|At|Before|By|For|From|If|In|On|Since|That|To|Under|Until|When|With|Without)\b"
)
GENERATED = "compile-table*.md"
# The blocks of a page that may be wider, as markdown-it names them.
WIDE_BLOCKS = {"table_open", "fence", "code_block", "html_block"}
LINK_TARGET = re.compile(r"(?<=\])\([^()\s]*\)|<?https?://\S+")


class Finding(NamedTuple):
    path: Path
    line: int
    text: str


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Check the prose of pages, docstrings and comments.")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path()], help="files or folders")
    files = list(files_in(parser.parse_args(arguments).paths))
    findings = sorted([*wide_doc_lines(files), *(finding for path in files for finding in check(path))])
    for path, line, text in findings:
        print(f"{path}:{line}: {text}")
    for path, count in Counter(finding.path for finding in findings).most_common():
        print(f"{count:6}  {path}")
    print(f"check_prose: {len(findings)} findings in {len(files)} files")
    sys.exit(bool(findings))


def files_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield paths that are files, and the pages and Python files below the others."""
    for path in paths:
        if path.is_file():
            yield path
        elif not path.exists():
            sys.exit(f"check_prose: there is no {path}")
        else:
            for name in checkout_files(ROOT, path):
                if name.suffix in (".md", ".py") and not name.match(GENERATED):
                    yield name


def check(path: Path) -> Iterator[Finding]:
    text = path.read_text(encoding="utf-8")
    lines = wide_page_lines(text) if path.suffix == ".md" else openings(text)
    return (Finding(path, line, problem) for line, problem in lines)


def wide_page_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a Markdown page that are too wide, with the number of their columns."""
    wide: set[int] = set()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in WIDE_BLOCKS and token.map:
            wide.update(range(*token.map))
    for index, line in enumerate(text.splitlines()):
        columns = len(LINK_TARGET.sub("", line))
        if columns > COLUMNS and index not in wide:
            yield index + 1, f"{columns} columns without the targets of links, at most {COLUMNS}"


def wide_doc_lines(files: list[Path]) -> Iterator[Finding]:
    """Yield the lines of docstrings and comments in Python files that ruff finds too wide."""
    python = [str(path) for path in files if path.suffix == ".py"]
    if not python:
        return
    options = ["--isolated", "--select=W505", f"--config=lint.pycodestyle.max-doc-length={COLUMNS}"]
    command = [sys.executable, "-m", "ruff", "check", *options, "--exit-zero", "--output-format=json", *python]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"check_prose: ruff failed: {done.stderr.strip()}")
    for found in json.loads(done.stdout):
        path = Path(found["filename"])
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        yield Finding(path, found["location"]["row"], found["message"])


def openings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and comments of Python source that open with a forbidden word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            if found := OF_DOCSTRINGS.match(node.value.value.strip()):
                yield node.lineno, f'a docstring opens with "{found[0]}"'
    last = 0  # a comment of several lines opens on its first
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            row, standalone = token.start[0], not token.line[: token.start[1]].strip()
            continues = standalone and last == row - 1
            last = row if standalone else 0
            if not continues and (found := OPENINGS.match(token.string.lstrip("#: "))):
                yield row, f'a comment opens with "{found[0]}"'


if __name__ == "__main__":
    main(sys.argv[1:])
