"""HTML pages in one file without external assets: tables, heat maps and plots."""
