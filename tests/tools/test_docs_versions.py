"""The site's list of versions, without Sphinx."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs_versions import main


@pytest.mark.parametrize(
    ("folders", "listed", "first"),
    [
        (["0.2.0"], '["0.2.0"]', "0.2.0"),
        (["0.9.0", "0.10.0", "0.11.0rc1", "images"], '["0.11.0rc1", "0.10.0", "0.9.0"]', "0.10.0"),
        (["0.3.0.dev0"], '["0.3.0.dev0"]', "0.3.0.dev0"),
    ],
)
def test_versions_are_listed_and_the_newest_release_is_first(
    tmp_path: Path, folders: list[str], listed: str, first: str
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").touch()
    (tmp_path / "0.8.0").mkdir()  # without pages
    main(tmp_path)
    assert (tmp_path / "versions.js").read_text() == f"window.FASTMTL_VERSIONS = {listed};\n"
    front = (tmp_path / "index.html").read_text()
    assert f'content="0; url={first}/index.html"' in front and "0.8.0" not in front


def test_a_site_without_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no folder of a version: run make docs"):
        main(tmp_path)
