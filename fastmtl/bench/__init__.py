"""Benchmarks of the `fastmtl bench` command. A wheel contains them, but not `benchmarks/`."""
