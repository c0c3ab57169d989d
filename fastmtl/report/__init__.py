"""report.html: a page on a finished run, in one file without external assets."""

from fastmtl.report.build import write_report

__all__ = ["write_report"]
