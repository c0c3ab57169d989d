"""An HTTP server in a process of its own, for measurements over a real connection."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from urllib.error import URLError
from urllib.request import urlopen

WAIT = 60  # seconds for the start, and for the end after SIGTERM


class ServerProcess:
    """A running server, which answers `GET /health`; the block of `with` ends it by SIGTERM.

    command: starts the server on `port` of this machine. Raises RuntimeError if the server ends at
    its start or does not answer.
    """

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + WAIT
        while not self._answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at its start: {' '.join(command)}")
            if time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server does not answer after {WAIT} s: {' '.join(command)}")
            time.sleep(0.1)

    def stop(self) -> int:
        """Send SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/health"):
                return True
        except (URLError, ConnectionError):
            return False
