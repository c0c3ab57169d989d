"""The sources of the site, without Sphinx; `make docs` checks the result's links and anchors."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs_site import NAV, PAGES, ROOT, main, site_links, source_page


def test_the_sources_have_every_page_and_what_it_links_to(tmp_path: Path) -> None:
    main(tmp_path / "site")
    written = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.md")}
    docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert docs | set(PAGES.values()) | {"source/LICENSE.md"} <= written
    assert all(name in docs | set(PAGES.values()) or name.startswith("source/") for name in written)
    in_nav = [f"{page}.md" for pages in NAV.values() for page in pages if page != "notes/*"]
    pages = {name for name in docs | set(PAGES.values()) if not name.startswith("notes/")} - {"index.md"}
    assert len(in_nav) == len(set(in_nav)) and set(in_nav) == pages, "NAV of tools/docs_site.py"
    front = (tmp_path / "site" / "index.md").read_text()
    assert front.count("```{toctree}") == len(NAV) and ":caption: Plug in\n\nsurgery\n" in front


@pytest.mark.parametrize(
    ("page", "markdown", "expected"),
    [
        ("README.md", "[a](docs/data.md#x) ![b](docs/images/roofline.svg)", "[a](data.md#x) ![b](images/roofline.svg)"),
        ("README.md", "[a](CONTRIBUTING.md) [b](LICENSE)", "[a](contributing.md) [b](source/LICENSE.md)"),
        ("docs/notes/soak.md", "[a](../data.md) [b](../../README.md#x)", "[a](../data.md) [b](../index.md#x)"),
        ("docs/data.md", "[a](../tools/docs_site.py#L9)", "[a](source/tools/docs_site.py.md)"),
        ("docs/notes/soak.md", "[a](../../tests/soak)", "[a](../source/tests/soak.md)"),
        ("docs/data.md", "[a]: ../tools/docs_site.py", "[a]: source/tools/docs_site.py.md"),
        ("docs/data.md", 'x\n\n<a id="b-c"></a>\n## d\n', "x\n\n(b-c)=\n## d\n"),
        (
            "README.md",
            '<a href="docs/data.md#x"><img src="docs/images/roofline.svg">',
            '<a href="data.html#x"><img src="images/roofline.svg">',
        ),
        (
            "docs/data.md",
            "[a](https://example.org) [b](#x) `f[0](x, y)`",
            "[a](https://example.org) [b](data.md#x) `f[0](x, y)`",
        ),
    ],
)
def test_links_of_the_site(page: str, markdown: str, expected: str) -> None:
    assert site_links(page, markdown)[0] == expected


def test_pages_of_files_and_folders() -> None:
    assert "\n# tests/soak\n\n" in source_page("tests/soak") and "\n- `soak.py`\n" in source_page("tests/soak")
    assert f"py\n{(ROOT / 'setup.py').read_text()}\n~~~" in source_page("setup.py")
    notebook = source_page("examples/demo.ipynb")
    assert (
        "\n# The demo: " in notebook and "\n~~~~~~~~~~~~py\nimport fastmtl\n" in notebook and '"cells"' not in notebook
    )
