"""`fastmtl sweep`: one recipe with many settings."""
