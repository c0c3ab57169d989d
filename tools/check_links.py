"""Check the links of every Markdown page in this checkout: python tools/check_links.py [folder]

The target of a relative link must be a file or folder that git does not ignore. An anchor must be
a heading of the page, as GitHub names it, or an HTML id; in other files, a line such as #L10. A
source file that a page names in backquotes, by its path in the checkout, must exist. Links to other
sites are not followed. For each broken link, a line `file:line: reason` is printed.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from checkout_files import checkout_files

HTML_LINK = re.compile(r"""\b(?:href|src)=["']([^"']+)["']""")
HTML_ANCHOR = re.compile(r"""\b(?:id|name)=["']([^"']+)["']""")
LINE_ANCHOR = re.compile(r"L(\d+)(?:-L(\d+))?")


SOURCE_FILE = re.compile(r"([\w.-]+)/[\w./-]+\.(?:py|cpp|cu|cuh|h)")


class Page(NamedTuple):
    links: list[tuple[int, str]]  # line, target
    code: list[tuple[int, str]]  # line, text in backquotes
    anchors: set[str]


def main(arguments: list[str]) -> None:
    folder = Path(*arguments)
    names = {path.relative_to(folder).as_posix() for path in checkout_files(folder, folder)}
    pages = sorted(name for name in names if name.endswith(".md"))
    broken = [f"{page}:{line}: {why}" for page in pages for line, why in broken_links(folder, page, names)]
    print(*broken, f"check_links: {len(broken)} broken links in {len(pages)} pages", sep="\n")
    sys.exit(bool(broken))


def broken_links(folder: Path, page: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line number and reason for each broken link of a page. names: the files in `folder`."""
    folders = {str(parent) for name in names for parent in Path(name).parents}
    for line, link in read_page(folder / page).links:
        target, anchor = target_of(page, link)
        if link.startswith("/"):
            yield line, f"the link {link} begins with a slash: give the path from the folder of this page"
        elif not is_relative(link):
            continue
        elif target not in names and target not in folders:
            yield line, f"the link {link} leads to {target}, which is not a file or folder of this checkout"
        elif anchor and (target in folders or not has_anchor(folder / target, anchor)):
            yield line, f"the link {link} names the anchor #{anchor}, which {target} does not have"
    for line, text in read_page(folder / page).code:
        file = SOURCE_FILE.fullmatch(text)
        if file and file[1] in folders and text not in names:
            yield line, f"`{text}` is not a file of this checkout"


def is_relative(link: str) -> bool:
    parts = urlsplit(link)
    return not (parts.scheme or parts.netloc or parts.path.startswith("/"))


def target_of(page: str, link: str) -> tuple[str, str]:
    """Return the path in the checkout, and the anchor, to which a relative link of `page` leads."""
    parts = urlsplit(link)
    path = posixpath.join(posixpath.dirname(page), unquote(parts.path)) if parts.path else page
    return posixpath.normpath(path), unquote(parts.fragment)


def has_anchor(file: Path, anchor: str) -> bool:
    if file.suffix == ".md":
        return anchor in read_page(file).anchors
    rows = LINE_ANCHOR.fullmatch(anchor)
    if rows is None:
        return False
    first, last = int(rows[1]), int(rows[2] or rows[1])
    return 1 <= first <= last <= len(file.read_text(encoding="utf-8").splitlines())


@cache
def read_page(file: Path) -> Page:
    page = Page([], [], set())
    slugs: Counter[str] = Counter()
    tokens = MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        row = token.map[0] + 1 if token.map else 1
        if token.type == "html_block":
            add_html(page, row, token.content)
        elif token.type == "inline":
            add_inline(page, row, token.children or [])
            if before and before.type == "heading_open":
                slug = github_slug(token.children or [])
                page.anchors.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
                slugs[slug] += 1
    return page


def add_inline(page: Page, row: int, tokens: list[Token]) -> None:
    for token in tokens:
        if token.type in ("softbreak", "hardbreak"):
            row += 1
        elif token.type == "html_inline":
            add_html(page, row, token.content)
        elif token.type == "code_inline":
            page.code.append((row, token.content))
        elif token.type == "link_open":
            page.links.append((row, str(token.attrs["href"])))
        elif token.type == "image":
            page.links.append((row, str(token.attrs["src"])))


def add_html(page: Page, row: int, content: str) -> None:
    for number, line in enumerate(content.splitlines()):
        page.links.extend((row + number, link) for link in HTML_LINK.findall(line))
        page.anchors.update(HTML_ANCHOR.findall(line))


def github_slug(heading: list[Token]) -> str:
    """Return the anchor that GitHub gives a heading, without the number of a repeated heading."""
    text = "".join(token.content for token in heading if token.type in ("text", "code_inline"))
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")


if __name__ == "__main__":
    main(sys.argv[1:])
