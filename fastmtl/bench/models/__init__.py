"""Models of other libraries in the benchmark of surgery: one file per model, and a table."""
