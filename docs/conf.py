"""Settings of Sphinx for `make docs`; tools/docs_site.py writes the sources."""

from fastmtl.version import __version__

project = "fastmtl"
version = release = __version__
html_title = f"fastmtl {version}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
templates_path = ["_templates"]
# Furo's own sidebar, and the versions of the site below the search.
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "versions.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}

extensions = ["myst_parser"]
myst_enable_extensions = ["html_image"]
# The anchors that GitHub gives headings. `make docs` stops at a link to an unknown one.
myst_heading_anchors = 6

# A fence without a language is plain text, and examples may leave parts out.
highlight_language = "none"
suppress_warnings = ["misc.highlighting_failure"]
