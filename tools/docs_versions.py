"""Write the front page of the site and its list of versions: python tools/docs_versions.py SITE

SITE has a folder for each version, as `make docs` builds them. Every page reads SITE/versions.js,
so the pages of older versions also link to newer ones. SITE/index.html leads to the newest release,
or to the newest version if none is released.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

FRONT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={first}/index.html">
<title>fastmtl</title>
</head>
<body>
<h1>fastmtl</h1>
<ul>
{items}
</ul>
</body>
</html>
"""


def main(site: Path) -> None:
    names = versions(site)
    if not names:
        sys.exit(f"{site} has no folder of a version: run make docs")
    newest = next((name for name in names if not Version(name).is_prerelease), names[0])
    items = "\n".join(f'<li><a href="{name}/index.html">{name}</a></li>' for name in names)
    (site / "index.html").write_text(FRONT.format(first=newest, items=items), encoding="utf-8")
    (site / "versions.js").write_text(f"window.FASTMTL_VERSIONS = {json.dumps(names)};\n", encoding="utf-8")


def versions(site: Path) -> list[str]:
    """Return the names of the folders that hold a version, the newest first."""
    found = {}
    for page in site.glob("*/index.html"):
        try:
            found[Version(page.parent.name)] = page.parent.name
        except InvalidVersion:  # a folder of something else
            continue
    return [found[version] for version in sorted(found, reverse=True)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
