"""Errors of a process before it is connected to the others.

Only rank 0 prints, so the errors of other ranks have to reach it.
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
def errors_reach_rank_0() -> Iterator[None]:
    """Make a UserError in the block, on any rank, end the run with one message.

    Rank 0 raises its error at once, and the launcher ends the others. Another rank may be the only
    one that failed, for example if a file is missing on its host. This rank then connects to the
    others, and all raise its error. If the others cannot be reached, this rank prints the error
    itself. Torch is imported only for this connection.
    """
    try:
        yield
    except UserError as error:
        if is_first():
            raise
        _share(error)
        raise


def _share(error: UserError) -> None:
    from fastmtl.engine.distributed import join, this_process

    ranks = this_process()
    try:
        join(ranks, patience=PATIENCE)
    except (RuntimeError, ValueError):  # torch's errors if the connection fails
        print(f"fastmtl (rank {ranks.rank}): {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    ranks.agree(error)
