"""Code of the `fastmtl bench` command. A wheel contains this package, but not `benchmarks/`."""
