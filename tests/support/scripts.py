"""Scripts of tests in processes that are forked from one with all imports.

A new process takes four seconds to import torch, DeepSpeed and fastmtl. Each process of pytest
starts one server, which has them, has started nothing else and forks a process for each script.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

IMPORTS = ("fastmtl.loop", "deepspeed.runtime.zero.muon.muon_optimizer")  # torch's compiler comes with the latter


def run_script(script: str | Path, *arguments: object, timeout: float = 600, **environment: str) -> str:
    """Run `python script arguments` on the CPU in a forked process, and return its stdout.

    environment: variables besides those of this process and launch.py.

    Raises AssertionError with the end of its output if its exit status is not 0, and TimeoutError.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        request = {
            "arguments": [str(script), *map(str, arguments)],
            "environment": _environment() | environment,
            "folder": os.getcwd(),
            "outputs": [output.name, errors.name],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        child = _reply(server, 120)
        ended = bool(select.select([server.stdout], [], [], timeout)[0])
        if not ended:
            os.killpg(child, signal.SIGKILL)
        status = _reply(server, 10)
        text, more = output.read(), errors.read()
    if not ended:
        raise TimeoutError(f"{script} takes more than {timeout} s:\n{text[-4000:]}{more[-4000:]}")
    assert status == 0, text[-4000:] + more[-4000:]
    return text


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=1,
        text=True,
    )
    atexit.register(server.communicate)  # closes stdin, which ends it
    return server


def _environment() -> dict[str, str]:
    from launch import cpu_environment  # the server itself does without fastmtl and its own imports

    return {name: value for name, value in cpu_environment().items() if name != "TRITON_INTERPRET"}


def _reply(server: subprocess.Popen[str], timeout: float) -> int:
    assert server.stdout is not None
    if not select.select([server.stdout], [], [], timeout)[0]:
        raise TimeoutError(f"the server of scripts does not reply within {timeout} s")
    line = server.stdout.readline()
    assert line, f"the server of scripts has ended with status {server.wait()}: python {__file__} shows why"
    return int(line)


def _serve() -> dict[str, Any] | None:
    """Fork a process for each line of stdin; print its id and its exit status.

    Return the request in the forked process, None in the server.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print
    gc.disable()  # collections would look at the imports' objects again and again
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # a script that needs it says so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            replies.close()
            request: dict[str, Any] = json.loads(line)
            return request
        print(child, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)
    return None


def _become(request: dict[str, Any]) -> None:
    """Turn this forked process into the one of the script, and run it."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(request["outputs"], start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    script, *_ = sys.argv = request["arguments"]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    found = _serve()
    if found is not None:
        _become(found)
