"""What a process does before it has met the others of its run: its errors have to reach the first
one, which prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from fastmtl.errors import UserError
from fastmtl.system.launcher_variables import is_first

EXIT_USER_ERROR = 2
PATIENCE = timedelta(seconds=60)


@contextmanager
def errors_reach_the_first() -> Iterator[None]:
    """Make a UserError of this process end the run with one message. Imports torch only where that
    needs it.

    The first process raises the error at once, and the launcher ends the others. Another process
    may be the only one that failed (a file that is not on its host): it meets the others, and each
    then raises that error. Where the others do not come, it prints the error itself.
    """
    try:
        yield
    except UserError as error:
        if is_first():
            raise
        _tell(error)
        raise


def _tell(error: UserError) -> None:
    from fastmtl.engine.distributed import join, this_process

    ranks = this_process()
    try:
        join(ranks, patience=PATIENCE)
    except (RuntimeError, ValueError):  # torch's, for a meeting that does not come about
        print(f"fastmtl (rank {ranks.rank}): {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    ranks.agree(error)
