"""Write the sources from which Sphinx builds the site: python tools/docs_site.py FOLDER

The pages are written for GitHub. The site has the same text with other links:

- The pages outside docs/ become pages of the site: PAGES. The README is the front page.
- A link to another file of the checkout leads to a page that shows this file, and a link to a
  folder to a list of its files. The site therefore works on its own.

NAV groups the pages; every page of docs/ must be in it.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
from pathlib import Path

from check_links import is_relative, target_of
from checkout_files import checkout_files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
NAV = {
    "Start": ["install", "recipes", "tasks", "data", "encoders"],
    "Train": ["training", "models", "export", "serving", "multi-host", "papers", "reproductions"],
    "Plug in": ["surgery", "surgery-reference", "trainer", "accelerate", "lightning", "peft", "examples", "extending"],
    "Kernels": ["kernels", "compile-table", "compile-table-triton-3.6"],
    "Measure": ["does-it-pay", "benchmarks", "profiling", "scale-out", "gpu-check"],
    "Design": ["design", "design-deepspeed", "design-kernels", "design-cuda-graphs"],
    "Notes": ["notes/*"],
    "Project": ["contributing", "changelog", "security", "code-of-conduct"],
}
SOURCES = "source"
HTML_ANCHOR = re.compile(r"""^<a id="([^"]+)"></a>$""", re.MULTILINE)  # Sphinx needs its own kind of target
LINK = re.compile(r"""(?<=\]\()[^()\s]+|(?<=\]: )\S+|(?<=\bhref=")[^"]+|(?<=\bsrc=")[^"]+""")


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", folder / "images")
    docs = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    linked: set[str] = set()
    for page in [*PAGES, *docs]:
        text, targets = site_links(page, (ROOT / page).read_text(encoding="utf-8"))
        linked |= targets
        write(folder / site_path(page), text + navigation() if page == "README.md" else text)
    for target in linked - {*PAGES, *docs}:
        if (page := site_path(target)).startswith(SOURCES):
            write(folder / page, source_page(target))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def navigation() -> str:
    """Return the Markdown with which Sphinx groups the pages in its navigation, as NAV says."""
    return "".join(
        "\n\n```{toctree}\n:hidden:\n:glob:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"
        for caption, pages in NAV.items()
    )


def site_links(page: str, markdown: str) -> tuple[str, set[str]]:
    """Return a page's Markdown with links for the site, and the files and folders linked to."""
    here = posixpath.dirname(site_path(page))
    targets: set[str] = set()

    def site_link(found: re.Match[str]) -> str:
        link = found[0]
        target, anchor = target_of(page, link)
        if not is_relative(link) or not (ROOT / target).exists():
            return link  # a link to another site, or code that looks like a link
        targets.add(target)
        path = site_path(target)
        if markdown[found.start() - 1] == '"':  # Sphinx does not change links in HTML
            path = re.sub(r"\.md$", ".html", path)
        return posixpath.relpath(path, here) + (f"#{anchor}" if anchor and not path.startswith(SOURCES) else "")

    return HTML_ANCHOR.sub(r"(\1)=", LINK.sub(site_link, markdown)), targets


def site_path(target: str) -> str:
    """Return the path in the site's sources that shows a file or folder of the checkout."""
    if target.startswith("docs/") and (ROOT / target).is_file():
        return target.removeprefix("docs/")
    return PAGES.get(target) or f"{SOURCES}/{target}.md"


def source_page(target: str) -> str:
    """Return the Markdown of a page with a file, the cells of a notebook, or a list of files."""
    path = ROOT / target
    if path.is_dir():
        shown = "\n".join(f"- `{file.relative_to(path).as_posix()}`" for file in checkout_files(ROOT, path))
    elif path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
        shown = "\n\n".join(fenced(text, "py") if kind == "code" else text for text, kind in texts)
    else:
        shown = fenced(path.read_text(encoding="utf-8"), path.suffix.removeprefix("."))
    return f"---\norphan: true\n---\n# {target}\n\n{shown}\n"


def fenced(text: str, language: str) -> str:
    """Return Markdown that shows a text as it is."""
    fence = "~" * 12  # longer than any in a file
    return f"{fence}{language}\n{text}\n{fence}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
