"""Free ports of this machine."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from fastmtl.errors import UserError


def free_port() -> int:
    """Return a port that is free now, below those that Linux gives to outgoing connections.

    A port that the system chooses may be that of another connection by the time of its use. Two
    processes choose different ports, whatever the seed of `random`. Raises UserError if none is
    free.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no port between 20000 and 32000 is free on 127.0.0.1: end the programs that hold them")
