"""The version of fastmtl. pyproject.toml reads it here."""

# A constant, not importlib.metadata: gpu-check runs from a copy without installation and metadata.
__version__ = "0.2.0"
