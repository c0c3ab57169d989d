"""Benchmarks. They are here because the installed command runs them and no wheel holds `benchmarks/`."""
