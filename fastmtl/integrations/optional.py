"""The error for a library that is not installed."""

from __future__ import annotations

from importlib.util import find_spec

from fastmtl.errors import UserError


def require(library: str, what: str) -> None:
    """Raise UserError unless `library`, which has an extra of its own name, is installed.

    what: the module or class that needs it, for the message.
    """
    if find_spec(library) is None:
        raise UserError(f"{what} needs {library}: pip install 'fastmtl-torch[{library}]'")
