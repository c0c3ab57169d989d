"""The steps of `fastmtl serve`."""

from __future__ import annotations

import socket
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fastmtl.errors import UserError

BACKLOG = 2048  # connections that wait to be accepted


def check_libraries() -> None:
    """Raise UserError unless the libraries of the extra `serve` are installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'fastmtl-torch[serve]'")


def run_server(
    model_dir: Path, host: str, port: int, device: str | None, tokens: int, wait_ms: float, threads: int | None
) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C; then answer what waits, and return.

    port: 0 takes a free one. tokens, wait_ms: budget and deadline of a batch. threads: those of the
    model; default: all cores. Raises UserError before the model is loaded if the port is taken.
    """
    check_libraries()
    sockets = bound(host, port)
    import torch
    import uvicorn

    from fastmtl.inference.predict import load
    from fastmtl.serving.app import Limits, build_app
    from fastmtl.serving.packed import PackedPredictor, warm_up

    if threads is not None:
        torch.set_num_threads(threads)
    predictor = PackedPredictor(load(model_dir, device), tokens)
    warm_up(predictor)
    app = build_app(predictor, Limits(tokens=tokens, wait=wait_ms / 1000))
    port = sockets[0].getsockname()[1]
    for each in sockets:
        try:
            each.listen(BACKLOG)
        except OSError as error:  # another server has begun to listen meanwhile
            raise _unusable(host, port, error) from None
    shown = f"[{host}]" if ":" in host else host
    print(f"{', '.join(predictor.recipe.task_names)} on http://{shown}:{port}/docs", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30, access_log=False, backlog=BACKLOG)
    with suppress(KeyboardInterrupt):  # raised again by uvicorn after the answers
        uvicorn.Server(config).run(sockets=sockets)


def bound(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of a host, bound to the port, which do not listen yet.

    port: 0 takes a free one. Until they listen, clients are refused. Raises UserError for an
    unknown host, and for a port that is taken or not allowed.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            each = socket.socket(family, kind, protocol)
            sockets.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind((address[0], sockets[0].getsockname()[1] or port, *address[2:]))
    except (OSError, UnicodeError) as error:
        for each in sockets:
            each.close()
        raise _unusable(host, port, error) from None
    return sockets


def _unusable(host: str, port: int, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot serve on {host}, port {port}: {reason}: choose others with --host and --port")
