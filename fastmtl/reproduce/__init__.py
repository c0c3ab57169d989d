"""The command `fastmtl reproduce`: the runs of a published report, and its tables beside ours."""
