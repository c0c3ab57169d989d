"""The command `fastmtl sweep`, which trains one recipe with many settings."""
