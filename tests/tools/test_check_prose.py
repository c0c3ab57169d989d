"""Wide lines and forbidden openings are found, with their line, and a count per file follows."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_prose

LONG = "word " * 21
TARGET = "../" + "folder/" * 20
PAGE = f"""# Page

A [link to a file]({TARGET}file.md#anchor) has a short text.
{LONG}
| {LONG} |
|---|
| {LONG} |

```
{LONG}
```

- A list item, {LONG}
"""
MODULE = f'''"""Of the module."""

# What opens a comment is checked,
# Where its second line begins is not.
NAME = "Of a value"  # How it is used
WIDE = "{LONG}"
"""Who reads an attribute's docstring."""


def function() -> None:
    """Whatever opens with another word is fine."""
    # {LONG}


class Class:
    """
    In which a docstring begins on its second line.
    """

    async def method(self) -> None:
        """Return {LONG}"""
'''


def test_each_fault_is_found_at_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text(PAGE)
    Path("module.py").write_text(MODULE)
    Path(".venv").mkdir()
    Path(".venv", "ignored.py").write_text(MODULE)
    with pytest.raises(SystemExit) as stopped:
        check_prose.main(["."])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    expected = {
        "module.py": [
            (1, 'a docstring opens with "Of"'),
            (3, 'a comment opens with "What"'),
            (5, 'a comment opens with "How"'),
            (7, 'a docstring opens with "Who"'),
            (12, "Doc line too long"),
            (16, 'a docstring opens with "In which"'),
            (21, "Doc line too long"),
        ],
        "page.md": [(4, "105 columns"), (13, "120 columns")],
    }
    found = [(name, line, text) for name, faults in expected.items() for line, text in faults]
    assert len(lines) == len(found) + 3
    for line, (name, row, text) in zip(lines, found, strict=False):
        assert line.startswith(f"{name}:{row}: {text}"), line
    assert [line.split() for line in lines[-3:-1]] == [["7", "module.py"], ["2", "page.md"]]
    assert lines[-1] == "check_prose: 9 findings in 2 files"


def test_clean_files_pass_and_a_missing_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.md").write_text("# Page\n\nShort.\n")
    with pytest.raises(SystemExit) as stopped:
        check_prose.main([str(tmp_path / "page.md")])
    assert not stopped.value.code and capsys.readouterr().out == "check_prose: 0 findings in 1 files\n"
    with pytest.raises(SystemExit, match="check_prose: there is no .*nowhere"):
        check_prose.main([str(tmp_path / "nowhere")])


def test_only_a_comment_may_open_with_a_preposition_such_as_with() -> None:
    found = list(check_prose.openings('"""With dropout."""\n# With a reason.\n'))
    assert found == [(1, 'a docstring opens with "With"')]
