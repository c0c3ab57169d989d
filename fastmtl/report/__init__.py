"""report.html: what a run did, in one file without external assets."""

from fastmtl.report.build import CHANGES, write_report
from fastmtl.report.results import collect_results

__all__ = ["CHANGES", "collect_results", "write_report"]
