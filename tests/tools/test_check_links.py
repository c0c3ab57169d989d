"""Broken links and anchors are found in every place that Markdown allows."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_links

README = """# Two commands, `make` & more

## Twice
## Twice

[file](docs/page.md), [folder](docs), [own](#two-commands-make--more), [twice](#twice-1), [html](docs/page.md#here)
[lines](code.py#L1-L2), [spaces](docs/a%20b.md), [site](https://example.org/none#none), `[code](none.md)`

| a table |
|---|
| [missing](docs/none.md) |

- a list, whose second line has
  [ignored](ignored.md) and ![an image](docs/none.svg)

[third](#twice-2) and [heading](docs/page.md#none)
[line](code.py#L2-L3)
[root](/docs/page.md), <a href="none.html">html</a>
[outside](../none.md) [by reference][ref]
`docs/code.py` `docs/none.py` `other/none.py` `docs/none.py --option`

<img alt="block"
     src="block.svg">

[ref]: docs/reference.md
"""
BROKEN = [
    (11, "docs/none.md leads to docs/none.md, which is not a file or folder of this checkout"),
    (14, "ignored.md leads to ignored.md, which is not"),
    (14, "docs/none.svg leads to docs/none.svg, which is not"),
    (16, "#twice-2 names the anchor #twice-2, which README.md does not have"),
    (16, "docs/page.md#none names the anchor #none, which docs/page.md does not have"),
    (17, "code.py#L2-L3 names the anchor #L2-L3, which code.py does not have"),
    (18, "/docs/page.md begins with a slash"),
    (18, "none.html leads to none.html, which is not"),
    (19, "../none.md leads to ../none.md, which is not"),
    (19, "docs/reference.md leads to docs/reference.md, which is not"),
    (23, "block.svg leads to block.svg, which is not"),
]


def test_broken_links_are_found_at_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "page.md").write_text('# Page\n\n<a id="here"></a> [up](../README.md#twice)\n')
    (tmp_path / "docs" / "a b.md").write_text("# Spaces\n")
    (tmp_path / "code.py").write_text("one = 1\ntwo = 2\n")
    (tmp_path / "docs" / "code.py").write_text("")
    (tmp_path / "ignored.md").write_text("[not read](none.md)\n")
    (tmp_path / ".gitignore").write_text("ignored.md\n")
    with pytest.raises(SystemExit) as stopped:
        check_links.main([str(tmp_path)])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == f"check_links: {len(BROKEN) + 1} broken links in 3 pages"
    assert lines.pop() == "README.md:20: `docs/none.py` is not a file of this checkout"
    for found, (line, reason) in zip(lines, BROKEN, strict=True):
        assert found.startswith(f"README.md:{line}: the link {reason}"), found
