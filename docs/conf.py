"""Settings of Sphinx for `make docs`; tools/docs_site.py writes the sources."""

project = "fastmtl"
html_title = "fastmtl"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False

extensions = ["myst_parser"]
myst_enable_extensions = ["html_image"]
# The anchors that GitHub gives headings. `make docs` stops at a link to an unknown one.
myst_heading_anchors = 6

# A fence without a language is plain text, and examples may leave parts out.
highlight_language = "none"
suppress_warnings = ["misc.highlighting_failure"]
