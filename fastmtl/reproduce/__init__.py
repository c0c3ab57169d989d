"""`fastmtl reproduce`: the runs of a report, and its tables beside ours."""
