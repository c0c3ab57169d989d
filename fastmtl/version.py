"""The version of fastmtl. pyproject.toml reads it here."""

# A constant, not importlib.metadata: gpu-check runs from an uninstalled copy, which has no metadata.
__version__ = "0.1.0"
