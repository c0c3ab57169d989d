"""The command `fastmtl sweep`: a recipe with many settings."""
